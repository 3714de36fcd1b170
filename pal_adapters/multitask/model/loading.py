"""Reads the folder of a `TaskHeads`: everything is checked before it reaches the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

from pal_adapters.errors import ConfigError, StorageError, UnsupportedError

from .adapter_files import add_adapters, check_adapter_files, reading
from .base import base_tensors, embedding_tensors
from .contents import ADDED, EMBEDDINGS, HEADS, OUTPUT, POOLER, Contents, base_folder, width_of
from .description import Description, read_description
from .files import cause_of, check_fit, copy_into, inside, read_json, read_tensors, tensor_files
from .heads import Head
from .language import output_tensors
from .routes import adapter_names, check_adapter
from .tasks_file import read_tasks

_DEPTH = re.compile(r"(num|n)_((hidden|encoder|decoder)_)?layers?|(encoder|decoder)_layers")


def load(directory: Path, backbone: Any | None) -> Contents:
    """Reads a folder, see `TaskHeads.from_pretrained`, which puts a backbone back after an error."""
    description = read_description(directory)
    check_adapter_files(description, directory)
    heads = {task: description.heads[route["head"]] for task, route in description.tasks.items()}
    described = read_tasks(directory, heads)
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
    if own:
        backbone = _load_base(description, directory, stored.get("base"))
    if description.embeddings:
        _resize_embeddings(backbone, stored[EMBEDDINGS], directory)
    backbone = add_adapters(backbone, description, directory)
    routes = description.routes()
    with reading(description.path):
        for task, route in routes.items():
            check_adapter(backbone, route.adapter, task)
    contents = Contents(
        backbone,
        nn.ModuleDict(),
        routes,
        description.balance,
        base_tensors(backbone),
        description.base_trained,
        description.output_layer,
    )
    contents.described = described
    _fill(contents, description, stored, directory, own=own)
    return contents


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


def _fill(
    contents: Contents,
    description: Description,
    stored: Mapping[str, dict[str, Tensor]],
    directory: Path,
    *,
    own: bool,
) -> None:
    """Builds the heads and copies the folder's weights into them and into the base model."""
    backbone, base = contents.backbone, contents.base
    width = width_of(backbone)
    with torch.device("meta"):  # a damaged description may ask for more memory than there is
        shapes = nn.ModuleDict({name: Head(config, width) for name, config in description.heads.items()})
    check_fit(dict(shapes.named_parameters()), stored[HEADS], directory / f"{HEADS}.safetensors")
    device = next(backbone.parameters()).device
    for name, config in description.heads.items():
        contents.heads[name] = Head(config, width).to(device)
    targets: list[tuple[dict[str, Any], str, Path]] = [(dict(contents.heads.named_parameters()), HEADS, directory)]
    if description.base_trained and len(contents.own_base()) < len(base):
        raise UnsupportedError(
            f"{directory} has a trained base model, and an adapter of the backbone trains part of that in place "
            "(base_weights='in_place'): use base_weights='copies'."
        )
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
    for tensors, stem, _ in targets:
        copy_into(tensors, stored[stem])


def _load_base(description: Description, directory: Path, tensors: Mapping[str, Tensor] | None) -> Any:
    saved = base_folder(directory)
    # The folder may hold the base model of another run, which this one did not train.
    stored = description.base_trained and saved.is_dir()
    source = str(saved) if stored else description.base["name_or_path"]
    if not source:
        raise StorageError(f"{directory} does not say which base model it is for: pass backbone=..., the base model.")
    wanted = description.base_class()
    try:
        config = wanted.config_class.from_pretrained(source)
        _check_implementations(config)
        count = len(tensors) if stored and tensors is not None else _tensors_of(source)
        if count is not None:
            _check_depth(config, count)
        return wanted.from_pretrained(source, config=config, use_safetensors=True)
    except Exception as error:  # the errors of transformers and of the Hub have no common base
        raise StorageError(
            f"{source}, the base model of {directory}, cannot be loaded ({cause_of(error)}): pass backbone=..., the "
            "base model."
        ) from error


def _tensors_of(source: str) -> int | None:
    """The number of tensors of a base model in a folder or on the Hub; `None` without safetensors files."""
    found = {
        name: cached_file(source, f"model.safetensors{name}", _raise_exceptions_for_missing_entries=False)
        for name in ("", ".index.json")
    }
    if found[""] is not None:
        with safe_open(found[""], "pt") as tensors:
            return len(tensors.keys())
    return None if found[".index.json"] is None else len(read_json(Path(found[".index.json"]))["weight_map"])


def _check_implementations(config: PretrainedConfig) -> None:
    """Raises `ConfigError` if a config names attention that transformers would download as code, "owner/kernel"."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _check_implementations(value)
        elif name.endswith(("_implementation", "_implementation_internal")):
            for chosen in value.values() if isinstance(value, dict) else [value]:
                if isinstance(chosen, str) and "/" in chosen:
                    raise ConfigError(f"its config asks for the code of {chosen!r}")


def _check_depth(config: PretrainedConfig, tensors: int) -> None:
    """Raises `ConfigError` for more layers than a file has tensors: building them may take hours."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _check_depth(value, tensors)
        elif _DEPTH.fullmatch(name) and isinstance(value, int) and value > tensors:
            raise ConfigError(f"its config has {name}={value}, but its file has only {tensors} tensors")


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
    with reading(directory / f"{EMBEDDINGS}.safetensors"):
        backbone.resize_token_embeddings(rows, mean_resizing=False)
