"""The folder of a `TaskHeads`: backbone, adapters and heads, written and read as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn

from pal_adapters.errors import ConfigError, StorageError
from pal_adapters.hosts.unchanged import keep_values

from .base import added_parameters, base_tensors, embedding_tensors, has_resized_embeddings
from .description import DESCRIPTION_FILE, Description, describe, read_description
from .files import (
    cause_of,
    check_fit,
    copy_into,
    inside,
    read_json,
    read_tensor_file,
    read_tensors,
    staged,
    tensor_files,
    write_json,
    write_tensors,
)
from .heads import Head
from .language import output_tensors
from .parts import is_part
from .putting_back import put_back
from .routes import Route, adapter_host, adapter_names

HEADS, POOLER, OUTPUT, EMBEDDINGS, ADDED = "heads", "pooler", "output_layer", "embeddings", "added"
BASE_FOLDER = "base.model"
"""No adapter can have this name, as no module can."""


@dataclass
class Contents:
    """What a folder holds.

    Args:
        backbone: The model with its adapters.
        heads: The heads by name.
        routes: The route of each task.
        balance: See `TaskHeads`.
        base: The base model's own tensors, see `base_tensors`.
        base_trained: Whether the base model has been trained.
        output_trained: Whether the output layer of a language model has been trained.
    """

    backbone: Any
    heads: nn.ModuleDict
    routes: dict[str, Route]
    balance: str
    base: dict[str, Tensor]
    base_trained: bool = False
    output_trained: bool = False

    def head_configs(self) -> dict[str, Any]:
        """Configuration of each head."""
        return {name: head.config for name, head in self.heads.items() if isinstance(head, Head)}

    def pooler(self) -> dict[str, Tensor]:
        """The base model's own pooler, if a head reads it."""
        if all(config.pooling != "pooler" or config.reads_tokens for config in self.head_configs().values()):
            return {}
        return {name: tensor for name, tensor in self.base.items() if name.startswith("pooler.")}

    def added(self) -> dict[str, nn.Parameter]:
        """Parameters that the host added to the base model."""
        return added_parameters(self.backbone, self.base.values())


def save(contents: Contents, directory: Path, *, checkpoint: bool) -> None:
    """Writes a folder, see `TaskHeads.save_pretrained`."""
    backbone, base = contents.backbone, contents.base
    if any(is_part(parameter) for parameter in (*backbone.parameters(), *contents.heads.parameters())):
        raise StorageError(
            "each process holds only parts of the parameters (FSDP): call the trainer's save_model in all of them."
        )
    trained = contents.base_trained or any(tensor.requires_grad for tensor in base.values())
    resized = not trained and has_resized_embeddings(backbone)
    output = output_tensors(backbone)
    if not (trained or resized or contents.output_trained or any(tensor.requires_grad for tensor in output.values())):
        output = {}  # the same as in the checkpoint of the base model
    description = describe(
        backbone,
        contents.head_configs(),
        contents.routes,
        contents.balance,
        base_trained=trained,
        output_layer=bool(output),
        embeddings=resized,
    )
    stems = [HEADS, POOLER, OUTPUT, EMBEDDINGS, ADDED, *([f"{BASE_FOLDER}/model"] if trained else [])]
    with _writing(directory), staged(directory, DESCRIPTION_FILE, stems) as stage:
        _save_adapters(backbone, stage)
        if (directory / "README.md").exists():
            (stage / "README.md").unlink(missing_ok=True)  # PEFT's card is of the adapters alone
        write_tensors(contents.heads.state_dict(keep_vars=True), stage, HEADS)
        if trained:
            write_tensors(base, stage / BASE_FOLDER, "model")
            backbone.config.save_pretrained(stage / BASE_FOLDER)
        elif pooler := contents.pooler():
            # Many checkpoints have no pooler: then this one was made at random and is nowhere else.
            write_tensors(pooler, stage, POOLER)
        if resized:
            write_tensors(embedding_tensors(backbone, base), stage, EMBEDDINGS)
        if output:
            write_tensors(output, stage, OUTPUT)
        if checkpoint:
            write_tensors(contents.added(), stage, ADDED)
        write_json(description.to_json(), stage / DESCRIPTION_FILE)


def _save_adapters(backbone: Any, directory: Path) -> None:
    host = adapter_host(backbone)
    if host == "peft":
        resized = has_resized_embeddings(backbone)  # then they have a file of their own here
        backbone.save_pretrained(str(directory), save_embedding_layers=False if resized else "auto")
    elif host == "adapters":
        backbone.save_all_adapters(str(directory), use_safetensors=True)
        backbone.save_all_adapter_fusions(str(directory), use_safetensors=True)


def load(directory: Path, backbone: Any | None) -> Contents:
    """Reads a folder, see `TaskHeads.from_pretrained`. A backbone that was passed in is put back after an error."""
    description = read_description(directory)
    _check_adapter_files(description, directory)
    stored = {HEADS: read_tensors(directory, HEADS)}
    folder = base_folder(directory)
    if description.base_trained:
        stored["base"] = read_tensors(folder, "model")
        read_json(inside(folder, "config.json"))
    elif tensor_files(directory, POOLER)[0].is_file():
        stored[POOLER] = read_tensors(directory, POOLER)
    for stem, there in ((EMBEDDINGS, description.embeddings), (OUTPUT, description.output_layer)):
        if there:
            stored[stem] = read_tensors(directory, stem)
    own = backbone is None
    with nullcontext() if own else put_back(backbone):
        if own:
            backbone = _load_base(description, directory)
        if description.embeddings:
            _resize_embeddings(backbone, stored[EMBEDDINGS], directory)
        backbone = _add_adapters(backbone, description, directory)
        contents = Contents(
            backbone,
            nn.ModuleDict(),
            description.routes(),
            description.balance,
            base_tensors(backbone),
            description.base_trained,
            description.output_layer,
        )
        _fill(contents, description, stored, directory, own=own)
    return contents


def _fill(
    contents: Contents,
    description: Description,
    stored: Mapping[str, dict[str, Tensor]],
    directory: Path,
    *,
    own: bool,
) -> None:
    """Makes the heads, and copies what the folder holds into them and into the base model."""
    backbone, base = contents.backbone, contents.base
    width = width_of(backbone)
    with torch.device("meta"):  # a damaged description may ask for more memory than there is
        shapes = nn.ModuleDict({name: Head(config, width) for name, config in description.heads.items()})
    check_fit(dict(shapes.named_parameters()), stored[HEADS], directory / f"{HEADS}.safetensors")
    device = next(backbone.parameters()).device
    for name, config in description.heads.items():
        contents.heads[name] = Head(config, width).to(device)
    targets: list[tuple[dict[str, Any], str, Path]] = [(dict(contents.heads.named_parameters()), HEADS, directory)]
    if description.base_trained:
        targets.append((base, "base", base_folder(directory) / "model.safetensors"))
    elif POOLER in stored and contents.pooler():
        targets.append((contents.pooler(), POOLER, directory))
    if description.embeddings:
        targets.append((embedding_tensors(backbone, base), EMBEDDINGS, directory))
    output: dict[str, Any] = dict(output_tensors(backbone))
    words = any(config.kind == "language_modeling" for config in description.heads.values())
    if description.output_layer and (output or words):
        targets.append((output, OUTPUT, directory))
    elif own and words and description.base_trained and output:
        raise StorageError(
            f"{directory} has a trained base model, but not its output layer: pass backbone=, the base model with "
            "that layer."
        )
    for tensors, stem, where in targets:
        check_fit(tensors, stored[stem], where if where.suffix else where / f"{stem}.safetensors")
    keep_values(tensor for tensors, _, _ in targets for tensor in tensors.values())
    for tensors, stem, _ in targets:
        copy_into(tensors, stored[stem])


def restore(contents: Contents, directory: Path) -> Description:
    """Copies the weights of a checkpoint into a model of the same structure, see `TaskHeads.restore`."""
    description = read_description(directory)
    targets: list[tuple[dict[str, Any], Path, str]] = [
        (dict(contents.heads.named_parameters()), directory, HEADS),
        (dict(contents.added()), directory, ADDED),
    ]
    if description.base_trained:
        targets.append((contents.base, base_folder(directory), "model"))
    elif (pooler := contents.pooler()) and tensor_files(directory, POOLER)[0].is_file():
        targets.append((pooler, directory, POOLER))
    if description.embeddings:
        targets.append((embedding_tensors(contents.backbone, contents.base), directory, EMBEDDINGS))
    if description.output_layer and (output := output_tensors(contents.backbone)):
        targets.append((dict(output), directory, OUTPUT))
    stored = [read_tensors(folder, stem) for _, folder, stem in targets]
    for (tensors, folder, stem), values in zip(targets, stored, strict=True):
        check_fit(tensors, values, folder / f"{stem}.safetensors")
    for (tensors, _, _), values in zip(targets, stored, strict=True):
        copy_into(tensors, values)
    return description


def fetch(name: str | Path, *, revision: str | None, token: str | bool | None) -> Path:
    """A local folder as it is; otherwise a Hub repo ID, whose files are downloaded.

    Raises:
        ConfigError: If `revision` or `token` is given for a local folder.
        StorageError: If there is neither, or the repository cannot be read.
    """
    if Path(name).is_dir():
        for argument, value in (("revision", revision), ("token", token)):
            if value is not None:
                raise ConfigError(f"{argument} has no effect for the folder {name}: leave it out.")
        return Path(name)
    repo = name.as_posix() if isinstance(name, Path) else name
    try:
        fetched = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            token=token,
            ignore_patterns=["last-checkpoint/*", "checkpoint-*/*"],  # what the Trainer resumes from
        )
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{repo} is neither a folder nor a repository that can be read from the Hub ({cause_of(error)}). Pass a "
            "folder that save_pretrained wrote, or 'owner/name'; private repositories need a token."
        ) from error
    return Path(fetched)


def base_folder(directory: Path) -> Path:
    """Where a trained base model is. Earlier releases called the folder `base`, as an adapter may be called."""
    place = directory / BASE_FOLDER
    return inside(directory, BASE_FOLDER if place.is_dir() else "base")


def width_of(backbone: Any) -> int:
    """`d`, the width of the hidden states."""
    width = getattr(getattr(backbone, "config", None), "hidden_size", 0)
    return int(width or backbone.get_input_embeddings().weight.shape[1])


def copy_saved(checkpoint: Path, directory: Path) -> None:
    """Copies what `load` reads from a checkpoint to a folder, and nothing that only `restore` reads."""
    description = read_description(checkpoint)
    stems = [HEADS, POOLER, OUTPUT, EMBEDDINGS, *([f"{BASE_FOLDER}/model"] if description.base_trained else [])]
    names = [BASE_FOLDER, *description.adapters, *description.fusions]
    if description.host == "peft":  # the adapter called "default" is in the folder itself
        names += ["adapter_config.json", "adapter_model.safetensors"]
    names += [path.name for stem in stems[:4] for path in checkpoint.glob(f"{stem}*safetensors*")]
    with staged(directory, DESCRIPTION_FILE, stems) as stage:
        for name in (*names, DESCRIPTION_FILE):
            if (checkpoint / name).is_dir():
                shutil.copytree(checkpoint / name, stage / name)
            elif (checkpoint / name).is_file():
                shutil.copy(checkpoint / name, stage / name)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turns any error of a writer into a `StorageError` that names the folder."""
    try:
        yield
    except Exception as error:  # a full disk is an OSError, a RuntimeError or an error of safetensors, by the writer
        raise StorageError(f"{directory} cannot be written ({cause_of(error)}). It is as it was before.") from error


@contextmanager
def _reading(place: Path) -> Iterator[None]:
    """Turns any error of a host into a `StorageError` that names the folder it read."""
    try:
        yield
    except Exception as error:  # errors of the hosts and of transformers have no common base
        raise StorageError(f"{place} cannot be loaded into this model ({cause_of(error)}).") from error


def _adapter_place(directory: Path, name: str, host: str) -> Path:
    return directory if host == "peft" and name == "default" else inside(directory, name)


_FILES = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "adapters": ("adapter_config.json", "adapter.safetensors"),
    "fusion": ("adapter_fusion_config.json", "model_adapter_fusion.safetensors"),
}


def _check_adapter_files(description: Description, directory: Path) -> None:
    """Raises `StorageError` unless each adapter and fusion has whole files, without links out of the folder."""
    kinds = dict.fromkeys(description.adapters, description.host) | dict.fromkeys(description.fusions, "fusion")
    for name, kind in kinds.items():
        place = _adapter_place(directory, name, description.host)
        wanted = [place / file for file in _FILES[kind]]
        more = [] if place == directory else sorted(place.rglob("*"))
        for path in dict.fromkeys([*wanted, *more]):
            inside(directory, str(path.relative_to(directory)))
            if path.suffix == ".safetensors":
                read_tensor_file(path)
            elif path.suffix == ".json":
                read_json(path)


def _load_base(description: Description, directory: Path) -> Any:
    saved = base_folder(directory)
    # The folder may hold the base model of another run, which this one did not train.
    stored = description.base_trained and saved.is_dir()
    source = str(saved) if stored else description.base["name_or_path"]
    if not source:
        raise StorageError(f"{directory} does not say which base model it is for: pass backbone=..., the base model.")
    wanted = description.base_class()
    try:
        return wanted.from_pretrained(source, **({"use_safetensors": True} if stored else {}))
    except Exception as error:  # the errors of transformers and of the Hub have no common base
        raise StorageError(
            f"{source}, the base model of {directory}, cannot be loaded ({cause_of(error)}): pass backbone=..., the "
            "base model."
        ) from error


def _resize_embeddings(backbone: Any, stored: dict[str, Tensor], directory: Path) -> None:
    """Gives the base model as many input embeddings as the folder holds."""
    rows = max((len(value) for value in stored.values()), default=0)
    now = backbone.get_input_embeddings().weight.shape[0]
    if rows == now:
        return
    if adapter_names(backbone):
        raise StorageError(
            f"{directory} has {rows} input embeddings, the backbone {now}: call resize_token_embeddings({rows}) "
            "before adapters are added."
        )
    with _reading(directory / f"{EMBEDDINGS}.safetensors"):
        backbone.resize_token_embeddings(rows, mean_resizing=False)


def _add_adapters(model: Any, description: Description, directory: Path) -> Any:
    """The model with the adapters and fusions of the folder. Those that it already has are not loaded."""
    present = adapter_names(model)
    if description.host == "peft":
        import peft  # only here: other hosts do without it

        for name in description.adapters:
            if name in present:
                continue
            place = _adapter_place(directory, name, "peft")
            with _reading(place):
                if isinstance(model, peft.PeftModel):
                    model.load_adapter(str(place), adapter_name=name)
                else:
                    model = peft.PeftModel.from_pretrained(model, str(place), adapter_name=name)
    elif description.host == "adapters":
        import adapters  # only here: other hosts do without it

        if adapter_host(model) is None:
            with _reading(directory):
                adapters.init(model)
        for name in description.adapters:
            if name not in present:
                with _reading(directory / name):
                    model.load_adapter(str(directory / name), load_as=name, use_safetensors=True)
        for name in description.fusions:
            if name not in model.adapters_config.fusions:
                with _reading(directory / name):
                    model.load_adapter_fusion(str(directory / name), load_as=name, use_safetensors=True)
    return model
