"""Saved setups: they keep the names of fusions, refer to nothing outside their folder, and load all-or-nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from adapters.composition import ALLOWED_NESTINGS, AdapterCompositionBlock, Fuse
from adapters.model_mixin import ModelAdaptersMixin
from adapters.utils import ADAPTERFUSION_CONFIG_NAME, SETUP_CONFIG_NAME, resolve_adapter_path

from pal_adapters.errors import PalAdaptersError, StorageError

from .files import all_files_checked
from .fusion import combination_config
from .penalty import fusions_in
from .transactions import changing

_BLOCKS = {block.__name__ for block in ALLOWED_NESTINGS}


def fuse_kwargs(original: Any) -> Any:
    """`Fuse._get_save_kwargs`, with the custom name of a fusion, without which a saved setup does not find it."""

    def wrapper(self: Fuse) -> Any:
        return {"name": self._name} if self._name else original(self)

    return wrapper


def load_adapter_setup(original: Any) -> Any:
    """`load_adapter_setup`, all-or-nothing, for a file that refers only to folders inside its own."""

    def wrapper(
        self: ModelAdaptersMixin,
        adapter_setup_name_or_path: str,
        version: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        options = {name: kwargs[name] for name in kwargs.keys() - _OWN_ARGUMENTS}
        try:
            folder = resolve_adapter_path(
                adapter_setup_name_or_path, version=version, do_exists_check=False, **options
            )
            fusions = _fusions(Path(folder))
            # Sources are the host's own adapters, as a rule.
            with changing(self), all_files_checked() if fusions else nullcontext():
                return original(self, folder, version, *args, **kwargs)
        except PalAdaptersError:
            raise
        except OSError as error:
            raise StorageError(
                f"the setup in {adapter_setup_name_or_path} cannot be loaded: {str(error).strip()}"
            ) from error

    return wrapper


_OWN_ARGUMENTS = {"custom_weights_loaders", "set_active", "use_safetensors"}


def _fusions(folder: Path) -> list[Fuse]:
    """The fusions of a saved setup, after checking its file."""
    path = folder / SETUP_CONFIG_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        head = saved["head_setup"]
        blocks = [saved["adapter_setup"], *([head] if isinstance(head, dict) else [])]
        unknown = [kind for block in blocks for kind in _kinds(block) if kind not in _BLOCKS]
        setups = [] if unknown else [AdapterCompositionBlock.from_dict(block) for block in blocks]
        names = [head] if isinstance(head, str) else list(head) if isinstance(head, list) else []
        for setup in setups:
            names += [*setup.flatten(), *(fuse.name for fuse in fusions_in(setup))]
        outside = [n for n in names if not (folder / n).resolve().is_relative_to(folder.resolve())]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise StorageError(
            f"{path} is not a readable setup ({type(error).__name__}: {error}): save it again with save_adapter_setup."
        ) from error
    if unknown:
        raise StorageError(f"{path} has {unknown[0]!r}, which is not a composition of adapters.")
    if outside:
        raise StorageError(f"{path} names {outside[0]!r}, which is outside its folder.")
    return [fuse for setup in setups for fuse in fusions_in(setup) if _is_combination(folder / fuse.name)]


def _is_combination(folder: Path) -> bool:
    try:
        saved = json.loads((folder / ADAPTERFUSION_CONFIG_NAME).read_text(encoding="utf-8"))
        return combination_config(saved["config"]) is not None
    except (OSError, ValueError, KeyError, TypeError):
        return True  # its loader reports what is wrong


def _kinds(block: dict[str, Any]) -> Iterator[Any]:
    """The types of a composition and of those nested in it."""
    if block["type"] != "single":
        yield block["type"]
        for child in block["children"]:
            yield from _kinds(child)
