"""The folder of a model of many tasks: base, adapters and heads, written and read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pal_adapters.multitask.training.distributed import is_part, rest

from . import storage
from .heads import Head, HeadConfig
from .language import output_tensors
from .routing import Route, is_fuse

if TYPE_CHECKING:
    from typing_extensions import Self

DESCRIPTION_FILE = "task_heads.json"
HEADS_FILE = "heads.safetensors"
POOLER_FILE = "pooler.safetensors"
OUTPUT_FILE = "output_layer.safetensors"


class SavedHeads(nn.Module):
    """A base model with heads, and routes of tasks to them, that a folder holds whole."""

    backbone: Any
    balance: str
    heads: nn.ModuleDict
    routes: dict[str, Route]
    width: int
    _base_trained: bool
    _output_trained: bool
    _base: tuple[Tensor, dict[str, Tensor]] | None

    @property
    def config(self) -> Any:
        """The configuration of the base model."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return next(self.backbone.parameters()).device

    def _heads(self) -> Iterator[tuple[str, Head]]:
        return ((name, head) for name, head in self.heads.items() if isinstance(head, Head))

    def save_pretrained(self, directory: str | Path, *, checkpoint: bool = False, **_: Any) -> None:
        """Writes adapters, heads and, if it was trained, the base to a folder that `from_pretrained` reads.

        Adapters and fusions are in the format of their host, in the folder's own layout, `directory/<adapter>`, so the
        host can load them alone. The base is an ordinary checkpoint in `directory/base.model`, without a head; the
        output layer of a base that has one for words is in a file beside it.

        Args:
            directory: The folder; it is made.
            checkpoint: Whether `restore` shall be able to read it, too, which puts the adapters in it once more.
            **_: Arguments of other `save_pretrained` methods, without a meaning here.
        """
        directory = Path(directory)
        if any(is_part(parameter) for parameter in self.parameters()):
            raise storage.StorageError(
                "each process has only parts of the parameters (FSDP): call the trainer's save_model in all of them."
            )
        directory.mkdir(parents=True, exist_ok=True)
        # Until all is written, the folder is not whole, whatever was in it before.
        (directory / DESCRIPTION_FILE).unlink(missing_ok=True)
        base = self._base_tensors()
        trained = self._base_trained or any(tensor.requires_grad for tensor in base.values())
        output = output_tensors(self.backbone)
        if not trained and not self._output_trained and not any(tensor.requires_grad for tensor in output.values()):
            output = {}  # as in the checkpoint of the base
        description = {
            "format": 1,
            "balance": self.balance,
            "heads": {name: asdict(head.config) for name, head in self._heads()},
            "tasks": {
                task: {"head": route.head, "adapter": _write_adapter(route.adapter), "weight": route.weight}
                for task, route in self.routes.items()
            },
            "base_trained": trained,
            "output_layer": bool(output),
            **storage.describe(self.backbone),
        }
        storage.save_adapters(self.backbone, directory)
        storage.write(self.heads.state_dict(), directory / HEADS_FILE)
        if trained:
            (directory / storage.BASE_FOLDER).mkdir(exist_ok=True)
            storage.write(base, directory / storage.BASE_FOLDER / "model.safetensors")
            self.config.save_pretrained(directory / storage.BASE_FOLDER)
        elif self._pooler():
            # Many checkpoints have none: then this one was made at random, and is nowhere else.
            storage.write(self._pooler(), directory / POOLER_FILE)
        if output:
            storage.write(output, directory / OUTPUT_FILE)
        if checkpoint:
            storage.write(storage.added_parameters(self.backbone, base.values()), directory / storage.ADDED_FILE)
        storage.write_json(description, directory / DESCRIPTION_FILE)  # last: a folder that has it is whole

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        backbone: nn.Module | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Reads what `save_pretrained` wrote, in evaluation mode. Losses of one's own have to be set again.

        Args:
            directory: The folder, or the name of a repository of the hub, `"owner/name"`.
            backbone: The base model, if it is not to be found under the name that it was loaded from. Adapters that it
                has already are not loaded.
            revision: Branch, tag or commit of a repository.
            token: Token for the hub; by default the one of the login.

        Raises:
            StorageError: If there is neither a folder nor a repository of that name, or it is not whole, or does not
                fit the model.
            ConfigError: If `revision` or `token` is given for a folder.
        """
        directory = storage.fetch(directory, revision=revision, token=token)
        description = _read_description(directory)
        own = backbone is None
        if own:
            backbone = storage.load_backbone(description, directory)
        else:
            backbone = storage.add_adapters(backbone, description, directory)
        model = cls(backbone, balance=description["balance"])
        for name, config in description["heads"].items():
            model.heads[name] = Head(HeadConfig(**config), model.width).to(model.device)
        for task, route in description["tasks"].items():
            model.routes[task] = Route(route["head"], _read_adapter(route["adapter"]), route["weight"])
        model._base_trained = description["base_trained"]
        heads, base, _ = model._files(directory)
        more = [base] if model._base_trained else model._pooler_file(directory)
        output: dict[str, Tensor] = dict(output_tensors(backbone))
        model._output_trained = description.get("output_layer", False)
        words = any(head.config.kind == "language_modeling" for _, head in model._heads())
        if model._output_trained and (output or words):
            more.append((output, directory / OUTPUT_FILE))
        elif own and words and model._base_trained and output:
            raise storage.StorageError(
                f"{directory} has a trained base, but not its output layer: pass backbone=, the base with that layer."
            )
        storage.copy_into(heads, *more)
        return model.eval()

    def restore(self, directory: str | Path) -> None:
        """Goes back to the weights of a folder written with `checkpoint=True`; all tensors stay the same objects."""
        directory = Path(directory)
        description = _read_description(directory)
        rest(self)
        heads, base, added = self._files(directory)
        storage.copy_into(heads, added, *([base] if description["base_trained"] else self._pooler_file(directory)))
        self._base_trained |= description["base_trained"]
        self._output_trained |= description.get("output_layer", False)

    def _files(self, directory: Path) -> list[tuple[dict[str, Any], Path]]:
        """Tensors, and the file that they are in: of the heads, of the base, of what was added to it."""
        base = self._base_tensors()
        return [
            (dict(self.heads.named_parameters()), directory / HEADS_FILE),
            (base, storage.base_folder(directory) / "model.safetensors"),
            (storage.added_parameters(self.backbone, base.values()), directory / storage.ADDED_FILE),
        ]

    def _pooler(self) -> dict[str, Tensor]:
        """The base's own pooler, if a head reads it."""
        if all(head.config.pooling != "pooler" or head.config.reads_tokens for _, head in self._heads()):
            return {}
        return {name: tensor for name, tensor in self._base_tensors().items() if name.startswith("pooler.")}

    def _pooler_file(self, directory: Path) -> list[tuple[dict[str, Any], Path]]:
        pooler, path = self._pooler(), directory / POOLER_FILE
        return [(pooler, path)] if pooler and path.is_file() else []

    def _base_tensors(self) -> dict[str, Tensor]:
        # An adapter that is added wraps modules, but keeps the tensors of the base. FSDP replaces them.
        first = next(self.backbone.parameters())
        if self._base is None or self._base[0] is not first:
            self._base = first, storage.base_tensors(self.backbone)
        return self._base[1]

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        self._base = None  # moving a model may replace its tensors
        return super()._apply(function, recurse)


def copy_saved(checkpoint: Path, directory: Path) -> None:
    """Copies what `from_pretrained` reads from a checkpoint to a folder, and nothing that only `restore` reads."""
    description = _read_description(checkpoint)
    names = [
        HEADS_FILE,
        POOLER_FILE,
        OUTPUT_FILE,
        storage.BASE_FOLDER,
        *description["adapters"],
        *description["fusions"],
    ]
    if description["host"] == "peft":  # has the adapter called "default" in the folder itself
        names += ["adapter_config.json", "adapter_model.safetensors"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DESCRIPTION_FILE).unlink(missing_ok=True)
    for name in (*names, DESCRIPTION_FILE):
        if (checkpoint / name).is_dir():
            shutil.copytree(checkpoint / name, directory / name, dirs_exist_ok=True)
        elif (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, directory / name)


def _write_adapter(adapter: Any) -> Any:
    if adapter is None or isinstance(adapter, str):
        return adapter
    stored: dict[str, Any] = {type(adapter).__name__: [_write_adapter(child) for child in adapter.children]}
    return stored | ({"name": adapter.name} if is_fuse(adapter) else {})


def _read_adapter(stored: Any) -> Any:
    if not isinstance(stored, dict):
        return stored
    import adapters.composition

    named = {key: value for key, value in stored.items() if key == "name"}
    ((name, children),) = ((key, value) for key, value in stored.items() if key != "name")
    return getattr(adapters.composition, name)(*[_read_adapter(child) for child in children], **named)


def _read_description(directory: Path) -> dict[str, Any]:
    path = directory / DESCRIPTION_FILE
    if not path.is_file():
        raise storage.StorageError(
            f"{path} is not there: {directory} was not written by TaskHeads, or not to the end."
        )
    return json.loads(path.read_text(encoding="utf-8"))
