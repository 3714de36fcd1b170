"""Saving and loading a setup with a fusion: with its name, and all of it or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.composition import AdapterCompositionBlock, Fuse

from pal_adapters.errors import ConfigError, PalAdaptersError

from .fusion import combination_config
from .penalty import fusions_in


def fuse_kwargs(original: Any) -> Any:
    """The host saves a setup without the name that a fusion may have of its own, and then does not find the fusion."""

    def wrapper(self: Fuse) -> Any:
        return {"name": self._name} if self._name else original(self)

    return wrapper


def load_adapter_setup_weights(original: Any) -> Any:
    """The host keeps the sources that it has read when a later one, or the fusion, cannot be read."""

    def wrapper(self: Any, folder: str, adapter_setup: AdapterCompositionBlock, *args: Any, **kwargs: Any) -> Any:
        if not any(_is_ours(Path(folder, fuse.name)) for fuse in fusions_in(adapter_setup)):
            return original(self, folder, adapter_setup, *args, **kwargs)
        known, active = self.adapters_config, self.active_adapters
        adapters, fusions, heads = set(known.adapters), set(known.fusions), set(getattr(self, "heads", ()))
        parts = tuple(f".{name}." for name in {*adapter_setup.flatten(), *fusions} & {*adapters, *fusions})
        before = {key: value.clone() for key, value in self.state_dict().items() if any(p in key for p in parts)}
        try:
            return original(self, folder, adapter_setup, *args, **kwargs)
        except Exception as error:  # whatever it was, the model goes back to what it was
            unread = next((name for name in adapter_setup.flatten() if name not in known.adapters), None)
            for name in set(known.fusions) - fusions:
                self.delete_adapter_fusion(name)
                known.fusion_name_map.pop(name, None)
            for name in set(known.adapters) - adapters:
                self.delete_adapter(name)
            for name in set(getattr(self, "heads", ())) - heads:
                self.delete_head(name)
            self.load_state_dict(before, strict=False)
            known.active_setup = active
            if isinstance(error, PalAdaptersError):
                raise
            what = f"the setup in {folder}" if unread is None else f"the adapter in {Path(folder, unread)}"
            raise ConfigError(f"{what} cannot be loaded: {str(error).strip()}") from error

    return wrapper


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / "adapter_fusion_config.json").read_text())
    except (OSError, ValueError):
        return folder.is_dir() and any(folder.glob("*adapter_fusion*"))
    return combination_config(config.get("config")) is not None
