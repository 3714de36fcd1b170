"""Registers a method with `adapters`."""

from __future__ import annotations

from collections.abc import Mapping

from pal_adapters.errors import ConfigError

from .config import CONFIGS, TaskAdapterConfig
from .patches import register as register_with_host


def register(config_class: type[TaskAdapterConfig], presets: Mapping[str, TaskAdapterConfig] | None = None) -> None:
    """Register a method with `adapters`. Idempotent.

    Args:
        config_class: the method's config, a dataclass that inherits the method's options and `TaskAdapterConfig`.
        presets: ready-made configs by their string; by default one, with the name of the method and default values.

    Raises:
        ConfigError: for any other class, or a string that the host or another package already uses.
    """
    if not (isinstance(config_class, type) and issubclass(config_class, TaskAdapterConfig)):
        raise ConfigError(f"config_class={config_class!r} is not allowed: pass a subclass of TaskAdapterConfig.")
    if CONFIGS.get(config_class.method.name) is config_class:
        return
    if presets is None:
        presets = {config_class.method.name: config_class()}
    register_with_host(config_class, dict(presets))
