"""Sources of a combination in PEFT: saved adapters, or adapters on the model, split by module."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pal_adapters.blocks.sites import Block, iter_blocks
from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.fusion.units import Pair
from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.registry import method_of
from pal_adapters.hosts.peft.saved import adapter_on, read_adapter
from pal_adapters.methods.houlsby.peft import HoulsbyPeftConfig

from .parts import NormPart, Part, UnitPart, houlsby_parts, lora_parts, unit_parts

PREFIX = "base_model.model."


@dataclass
class Source:
    """One source.

    Attributes:
        name: its name.
        config: its config.
        tensors: its tensors, by their names in the file.
        used: the names of the tensors that are combined: all but those of a head.
        parts: its weights at each module of the base model, by the module's name.
        path: where it was read; None for an adapter on the model.
        revision: the commit, if it was read from the Hub.
    """

    name: str
    config: PeftConfig
    tensors: dict[str, Tensor]
    used: set[str] = field(default_factory=set)
    parts: dict[str, Part] = field(default_factory=dict)
    path: str | None = None
    revision: str | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of the combined weights."""
        digest = hashlib.sha256()
        for name in sorted(self.used):
            tensor = self.tensors[name]
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]


def locate(path: str) -> tuple[str, str | None]:
    """Path and subfolder of a folder, a Hub repo ID, or a folder inside a Hub repo (`"user/repo/folder"`)."""
    if os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") < 2:
        return os.path.expanduser(path), None
    owner, repository, subfolder = path.split("/", 2)
    return f"{owner}/{repository}", subfolder


def read_source(model: nn.Module, name: str, path: str | None, revision: str | None) -> Source:
    """Read one source and split it by module.

    Args:
        model: the base model.
        name: name of the source.
        path: where it is saved; None if the adapter is on the model.
        revision: revision of a Hub repo.

    Raises:
        UnknownAdapterError: if the adapter is not on the model.
        ConfigError: if the source cannot be read or does not fit the model.
        UnsupportedError: if sources of this kind cannot be combined.
    """
    if path is None:
        found = adapter_on(model, name)
        if found is None:
            names = sorted(getattr(model, "peft_config", {}))
            raise UnknownAdapterError(
                f"source {name!r} is not on the model, which has {names}: pass the path or Hub repo ID of a saved "
                f"adapter, adapters={{{name!r}: '<path>'}}, or add the adapter to the model first."
            )
        config, tensors = found
    else:
        where, subfolder = locate(path)
        try:
            config, tensors, commit = read_adapter(model, where, subfolder=subfolder, revision=revision)
        except Exception as error:  # the Hub, the file system and safetensors raise errors without a common base
            raise ConfigError(
                f"source {name!r} could not be read from {path!r}: {type(error).__name__}: {error}. Pass a folder or "
                "Hub repo with adapter_config.json and adapter_model.safetensors."
            ) from error
        revision = commit or revision
    source = Source(name, config, {}, path=path, revision=revision)
    _take_apart(source, {key.removeprefix(PREFIX): value for key, value in tensors.items()}, model)
    return source


def _take_apart(source: Source, tensors: dict[str, Tensor], model: nn.Module) -> None:
    config, method = source.config, method_of(source.config)
    sites = config.sites if isinstance(config, TaskPeftConfig) else None
    if isinstance(config, TaskPeftConfig) and config.train_base:
        raise UnsupportedError(
            f"source {source.name!r} has also trained the base model (train_base=True), so its base weights differ "
            "from those of other sources: use sources trained on a frozen base model."
        )
    if isinstance(config, LoraConfig):
        source.parts, used = lora_parts(source.name, config, tensors)
    elif isinstance(config, HoulsbyPeftConfig) and method is not None:
        source.parts, used = houlsby_parts(config, tensors, method)
    elif isinstance(config, TaskPeftConfig) and method is not None:
        source.parts, used = unit_parts(config, tensors, method, model)
    else:
        raise UnsupportedError(
            f"source {source.name!r} has peft_type {source.config.peft_type}: sources are LoRA adapters, or adapters "
            "of pal_adapters that change a block (PALs, low-rank layers, Houlsby bottlenecks, ...)."
        )
    if not source.parts:
        raise ConfigError(f"source {source.name!r} from {source.path!r} has no weights.")
    broken = sorted(key for key in used if not bool(tensors[key].isfinite().all()))
    if broken:
        raise ConfigError(
            f"source {source.name!r} from {source.path!r} has values in {broken[0]} that are not finite: its training "
            "diverged, so leave it out."
        )
    _check_rest(source, {key: value for key, value in tensors.items() if key not in used}, model)
    source.tensors, source.used = tensors, used
    modules = dict(model.named_modules())
    blocks = list(iter_blocks(model, sites))
    for path, part in source.parts.items():
        _check_fit(source, path, part, modules, blocks)


def _check_rest(source: Source, rest: Mapping[str, Tensor], model: nn.Module) -> None:
    """Reject tensors that would be dropped silently: all but a head's, and copies of base weights."""
    own = {key.replace(".base_layer.", "."): value for key, value in model.state_dict().items()} if rest else {}

    def unchanged(key: str) -> bool:  # PEFT saves embeddings with an adapter that targets them
        mine = own.get(key.replace(".base_layer.", "."))
        return mine is not None and mine.shape == rest[key].shape and torch.equal(mine.cpu(), rest[key].to(mine.dtype))

    trunk = getattr(model, "base_model_prefix", "")
    inside = f"{trunk}." if trunk and hasattr(model, trunk) else ""
    heads = set() if inside else {key for key in rest if _module_of(key, model) is None}
    lost = sorted(key for key in rest if key not in heads and key.startswith(inside) and not unchanged(key))
    if lost:
        raise UnsupportedError(
            f"source {source.name!r} has also trained {lost[0]!r}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
            + ", which is neither a head nor something that can be combined: train sources without it."
        )


def _module_of(key: str, model: nn.Module) -> nn.Module | None:
    return dict(model.named_modules()).get(key.rpartition(".")[0])


def innermost(module: nn.Module) -> nn.Module:
    """The base model's own module inside any PEFT wrappers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear module or an embedding."""
    module = innermost(module)
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return found if all(isinstance(width, int) for width in found) else None  # type: ignore[return-value]


def _check_fit(
    source: Source, path: str, part: Part, modules: Mapping[str, nn.Module], blocks: Iterable[Block]
) -> None:
    module = modules.get(path)
    of = source.config.base_model_name_or_path
    other = f" Source {source.name!r} was trained on {of!r}: use sources of the same base model." if of else ""
    if module is None:
        raise ConfigError(f"source {source.name!r} adapts {path!r}, which the model does not have.{other}")
    block = next((b for b in blocks if path.startswith(f"{b.name}.")), None)
    layout = "tokens" if block is None or isinstance(part, UnitPart) else block.sites.layout
    if layout in ("tokens_first", "channels_first", "grid") and not (isinstance(part, Pair) and part.is_lora):
        raise UnsupportedError(
            f"source {source.name!r} adapts {path!r}, whose hidden states are not [batch, tokens, width]: only LoRA "
            "and modules of whole blocks can be combined there."
        )
    given: Any = None
    expected: Any = None
    if isinstance(part, Pair) and part.is_lora:
        expected = widths_of(module)
        if expected is None or part.embedding is not isinstance(innermost(module), nn.Embedding):
            raise UnsupportedError(
                f"source {source.name!r} adapts {path!r}, a {type(innermost(module)).__name__}: only LoRA on linear "
                "modules and embeddings can be combined."
            )
        given = part.down.shape[1], part.up.shape[0]
    elif isinstance(part, NormPart):
        weights = dict(innermost(module).named_parameters(recurse=False))
        given = {name: list(tensor.shape) for name, tensor in part.weights.items()}
        expected = {name: list(tensor.shape) for name, tensor in weights.items()}
    elif isinstance(part, UnitPart):
        given = {name: list(tensor.shape) for name, tensor in {**part.own, **part.shared}.items()}
        expected = part.shapes
    else:
        widths = widths_of(module)
        given = part.up.shape[0]
        expected = widths[1] if widths is not None else given if block is None else block.width
    if given != expected:
        raise ConfigError(f"source {source.name!r} has the widths {given} at {path!r}, the model {expected}.{other}")


def check_bases(sources: Iterable[Source], model: nn.Module) -> None:
    """Raise `ConfigError` if the sources and the model name different base models, or types of them."""
    sources, found = list(sources), getattr(getattr(model, "config", None), "model_type", None)
    for source in sources:
        kind = source.config.base_model_type if isinstance(source.config, TaskPeftConfig) else None
        if None not in (kind, found) and kind != found:
            raise ConfigError(
                f"source {source.name!r} was trained on a base model of type {kind!r}, and this one is of type "
                f"{found!r}: use sources trained on this base model, or check_base=False if both have the same "
                "weights."
            )
    names = {f"source {s.name!r}": s.config.base_model_name_or_path for s in sources}
    names["the model"] = model.__dict__.get("name_or_path")
    known = {who: str(name).rstrip("/") for who, name in names.items() if name}
    if len({os.path.basename(name) for name in known.values()}) > 1:
        raise ConfigError(
            "the sources belong to different base models: "
            + ", ".join(f"{who} to {name!r}" for who, name in known.items())
            + ". Use sources trained on this base model, or check_base=False if these names mean the same weights."
        )


def check_model(model: nn.Module) -> None:
    """Raise `UnsupportedError` if the model is a `PeftModel`."""
    if isinstance(model, PeftModel):
        raise UnsupportedError(
            "the base model is a PeftModel: pass its get_base_model(), which keeps the adapters, so that they can be "
            "named as sources."
        )
