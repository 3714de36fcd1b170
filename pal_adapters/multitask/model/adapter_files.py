"""The adapters and fusions in the folder of a `TaskHeads`, each in the format of its host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pal_adapters.errors import StorageError
from pal_adapters.hosts.base_files import base_files

from .base import has_resized_embeddings
from .description import Description
from .files import cause_of, inside, read_json, read_tensor_file
from .routes import adapter_host, adapter_names

_FILES = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "adapters": ("adapter_config.json", "adapter.safetensors"),
    "fusion": ("adapter_fusion_config.json", "model_adapter_fusion.safetensors"),
}


def save_adapters(backbone: Any, directory: Path) -> None:
    """Writes each adapter and fusion in the format of its host."""
    host = adapter_host(backbone)
    if host == "peft":
        resized = has_resized_embeddings(backbone)  # then they get a file of their own
        backbone.save_pretrained(str(directory), save_embedding_layers=False if resized else "auto")
    elif host == "adapters":
        backbone.save_all_adapters(str(directory), use_safetensors=True)
        backbone.save_all_adapter_fusions(str(directory), use_safetensors=True)


def check_adapter_files(description: Description, directory: Path) -> None:
    """Raises `StorageError` unless each adapter and fusion has complete files and no links out of the folder."""
    kinds = dict.fromkeys(description.adapters, description.host) | dict.fromkeys(description.fusions, "fusion")
    for name, kind in kinds.items():
        place = _adapter_place(directory, name, description.host)
        bases = base_files(place)  # which are checked with their adapter
        wanted = [*(place / file for file in _FILES[kind]), *bases]
        more = [] if place == directory else sorted(place.rglob("*"))
        for path in dict.fromkeys([*wanted, *more]):
            inside(directory, str(path.relative_to(directory)))
            if path.suffix == ".safetensors" and path not in bases:
                read_tensor_file(path)
            elif path.suffix == ".json":
                read_json(path)


def add_adapters(model: Any, description: Description, directory: Path, names: Mapping[str, str] | None = None) -> Any:
    """The model with the folder's adapters and fusions, except that those it already has are not loaded.

    Args:
        model: The model.
        description: What the folder holds.
        directory: The folder.
        names: New names of adapters, keyed by their names in the folder.
    """
    renamed = {name: (names or {}).get(name, name) for name in description.adapters}
    present = adapter_names(model)
    if description.host == "peft":
        import peft  # only here: other hosts do without it

        for name in description.adapters:
            if renamed[name] in present:
                continue
            place = _adapter_place(directory, name, "peft")
            with reading(place):
                if isinstance(model, peft.PeftModel):
                    model.load_adapter(str(place), adapter_name=renamed[name])
                else:
                    model = peft.PeftModel.from_pretrained(model, str(place), adapter_name=renamed[name])
    elif description.host == "adapters":
        import adapters  # only here: other hosts do without it

        if adapter_host(model) is None:
            with reading(directory):
                adapters.init(model)
        for name in description.adapters:
            if renamed[name] not in present:
                with reading(directory / name):
                    model.load_adapter(str(directory / name), load_as=renamed[name], use_safetensors=True)
        for name in description.fusions:
            if name not in model.adapters_config.fusions:
                with reading(directory / name):
                    model.load_adapter_fusion(str(directory / name), load_as=name, use_safetensors=True)
    return model


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turns any error of a host into a `StorageError` that names the folder it read."""
    try:
        yield
    except Exception as error:  # errors of the hosts and of transformers have no common base
        raise StorageError(f"{place} cannot be loaded into this model ({cause_of(error)}).") from error


def _adapter_place(directory: Path, name: str, host: str) -> Path:
    return directory if host == "peft" and name == "default" else inside(directory, name)
