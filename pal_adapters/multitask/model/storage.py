"""Files of a base model with adapters: what belongs to the base, and how each host writes and reads its part."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pal_adapters.errors import ConfigError, PalAdaptersError
from pal_adapters.hosts.which import host_of
from pal_adapters.multitask.training.distributed import part_of

from .routing import adapter_names, bare_model

# No adapter can have this name, for no module can.
BASE_FOLDER = "base.model"
ADDED_FILE = "added.safetensors"


class StorageError(PalAdaptersError, OSError):
    """Files cannot be written, or are not there, or do not fit the model. The message names the folder."""


def base_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """Weights and saved buffers of the base itself, under the names that they have without adapters."""
    bare = bare_model(backbone)
    with torch.device("meta"):
        skeleton = _model_class(bare)(cast("Any", bare).config)
    present = {
        **dict(bare.named_parameters(remove_duplicate=False)),
        **dict(bare.named_buffers(remove_duplicate=False)),
    }
    # What a host wraps lies one level deeper in its wrapper.
    unwrapped = {name.replace(".base_layer.", "."): tensor for name, tensor in present.items()}
    unwrapped |= {name: tensor for name, tensor in present.items() if name in skeleton.state_dict()}
    return {name: unwrapped[name] for name in skeleton.state_dict() if name in unwrapped}


def added_parameters(backbone: nn.Module, base: Iterable[Tensor]) -> dict[str, nn.Parameter]:
    """Parameters that are not the base's: of adapters, fusions and heads of the host. Shared ones once."""
    known = {id(tensor) for tensor in base}
    return {name: parameter for name, parameter in backbone.named_parameters() if id(parameter) not in known}


def save_adapters(backbone: Any, directory: Path) -> None:
    """All adapters and fusions, in the format and the layout of the host."""
    host = host_of(backbone)
    if host == "peft":
        backbone.save_pretrained(str(directory))
    elif host == "adapters":
        backbone.save_all_adapters(str(directory), use_safetensors=True)
        backbone.save_all_adapter_fusions(str(directory), use_safetensors=True)


def fetch(name: str | Path, *, revision: str | None, token: str | bool | None) -> Path:
    """A folder, as it is; what is none is a repository of the hub, and its files are fetched.

    Raises:
        ConfigError: For arguments of a repository, of a folder.
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
            ignore_patterns=["last-checkpoint/*", "checkpoint-*/*"],  # the Trainer's, to resume from
        )
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{repo} is no folder, and no repository that can be read from the hub "
            f"({' '.join(str(error).split())[:200]}). Pass a folder that save_pretrained wrote, or 'owner/name'; "
            "private repositories need a token."
        ) from error
    return Path(fetched)


def base_folder(directory: Path) -> Path:
    """Where a trained base is: in `base`, if a folder was written when an adapter could not have that name."""
    place = directory / BASE_FOLDER
    return place if place.is_dir() else directory / "base"


def load_backbone(description: Mapping[str, Any], directory: Path) -> Any:
    """The base, with the adapters that `save_adapters` wrote."""
    base = description["base"]
    saved = base_folder(directory)
    # The folder may hold the base of another run, which this one did not train.
    source = str(saved) if description["base_trained"] and saved.is_dir() else base["name_or_path"]
    if not source:
        raise StorageError(f"{directory} does not say which base model it is for: pass backbone=..., the base model.")
    model_class = getattr(importlib.import_module(base["module"]), base["class"])
    return add_adapters(model_class.from_pretrained(source), description, directory)


def add_adapters(model: Any, description: Mapping[str, Any], directory: Path) -> Any:
    """The model with the adapters that `save_adapters` wrote; it is changed."""
    names = description["adapters"]
    if description["host"] == "peft":
        import peft

        places = {name: str(directory if name == "default" else directory / name) for name in names}
        first, *rest = names
        if isinstance(model, peft.PeftModel):
            rest = [name for name in names if name not in model.peft_config]
        else:
            model = peft.PeftModel.from_pretrained(model, places[first], adapter_name=first)
        for name in rest:
            model.load_adapter(places[name], adapter_name=name)
    elif description["host"] == "adapters":
        import adapters

        if not hasattr(model, "adapters_config"):
            adapters.init(model)
        for name in names:
            if name not in adapter_names(model):
                model.load_adapter(str(directory / name), load_as=name, use_safetensors=True)
        for name in description["fusions"]:
            if name in model.adapters_config.fusions:
                continue
            model.load_adapter_fusion(str(directory / name), load_as=name, use_safetensors=True)
    return model


def describe(backbone: Any) -> dict[str, Any]:
    """What `load_backbone` has to know."""
    host = host_of(backbone)
    model = backbone.get_base_model() if host == "peft" else backbone
    model_class = _model_class(model)
    return {
        "host": host,
        "base": {
            "module": model_class.__module__ if model_class.__module__.startswith("adapters.") else "transformers",
            "class": model_class.__name__,
            "name_or_path": getattr(model.config, "_name_or_path", "") or getattr(model, "name_or_path", ""),
        },
        "adapters": list(adapter_names(backbone)),
        "fusions": list(backbone.adapters_config.fusions) if host == "adapters" else [],
    }


def _model_class(model: nn.Module) -> type[nn.Module]:
    # `adapters.init` puts a class of its own, made on the spot, in front of the model's.
    for model_class in type(model).__mro__:
        if model_class.__module__.startswith(("transformers.", "adapters.")) and not model_class.__name__.endswith(
            ("Mixin", "PreTrainedModel")
        ):
            return model_class
    return type(model)


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A file of safetensors; each tensor in its own memory."""
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file."""
    if not path.is_file():
        raise StorageError(f"{path} is not there.")
    return load_file(path)


def check_fit(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: Path) -> None:
    """Raises `StorageError` unless the stored values have the names and shapes of the tensors."""
    missing, extra = sorted(set(tensors) - set(stored)), sorted(set(stored) - set(tensors))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model lacks"
        raise StorageError(f"{where} {what} ({len(missing)} missing, {len(extra)} too many): it is of another model.")
    for name, tensor in tensors.items():
        if tensor.shape != stored[name].shape:
            raise StorageError(
                f"{where}: {name} has the shape {list(stored[name].shape)}, not {list(tensor.shape)}: it is of "
                "another model."
            )


def copy_into(*pairs: tuple[Mapping[str, Tensor], Path]) -> None:
    """Copies the values of files into tensors, which stay the same objects.

    Raises:
        StorageError: If a file is missing or does not fit; then nothing was changed.
    """
    found = [(tensors, read(path), path) for tensors, path in pairs]
    for tensors, stored, path in found:
        check_fit(tensors, stored, path)
    with torch.no_grad():
        for tensors, stored, _ in found:
            for name, tensor in tensors.items():
                tensor.copy_(part_of(stored[name], tensor))


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """A JSON file for people to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
