"""Deleting adapters and fusions from a model of `adapters`, including their configs."""

from __future__ import annotations

from typing import Any

from adapters.composition import Fuse
from adapters.model_mixin import ModelAdaptersMixin

from pal_adapters.hosts.in_place import check_originals

from .in_place import parts_of


def delete_adapter(original: Any) -> Any:
    """`ModelAdaptersMixin.delete_adapter`, with the adapter's config."""

    def wrapper(self: ModelAdaptersMixin, adapter_name: str) -> None:
        known = self.adapters_config
        key = known.adapters.get(adapter_name)
        check_originals(parts_of(self, adapter_name))
        original(self, adapter_name)
        if key not in known.adapters.values():
            known.config_map.pop(key, None)

    return wrapper


def delete_adapter_fusion(original: Any) -> Any:
    """`ModelAdaptersMixin.delete_adapter_fusion`, with the fusion's config and custom name."""

    def wrapper(self: ModelAdaptersMixin, adapter_names: Fuse | list[str] | str) -> None:
        known = self.adapters_config
        name = adapter_names.name if isinstance(adapter_names, Fuse) else adapter_names
        name = ",".join(name) if isinstance(name, list) else name
        key = known.fusions.get(name)
        original(self, adapter_names)
        known.fusion_name_map.pop(name, None)
        if key not in known.fusions.values():
            known.fusion_config_map.pop(key, None)

    return wrapper
