"""Registers a method with PEFT."""

from __future__ import annotations

import sys
from typing import Any

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.method import REGISTERED

from .config import TaskPeftConfig
from .tuner import TaskTuner
from .tuner import register as register_with_host


def register(
    config_class: type[TaskPeftConfig],
    tuner_class: type[TaskTuner] | None = None,
    *,
    base: type[TaskTuner] = TaskTuner,
) -> None:
    """Register a method with PEFT. Idempotent.

    Args:
        config_class: the method's config, a dataclass that inherits the method's options and `TaskPeftConfig`.
        tuner_class: the method's tuner; by default one that puts the method's units into the blocks.
        base: the base class of such a tuner.

    Raises:
        ConfigError: for any other class, or a name that PEFT or another package already uses.
    """
    if not (isinstance(config_class, type) and issubclass(config_class, TaskPeftConfig)):
        raise ConfigError(f"config_class={config_class!r} is not allowed: pass a subclass of TaskPeftConfig.")
    method = config_class.method
    if REGISTERED["peft"].get(method.name) is config_class:
        return
    register_with_host(method, config_class, tuner_class or _make_tuner(config_class, base))
    REGISTERED["peft"][method.name] = config_class


def _make_tuner(config_class: type[TaskPeftConfig], base: type[TaskTuner]) -> type[TaskTuner]:
    """Make the tuner of a method without code of its own, and the layer that it gives each block.

    PEFT tells methods apart by these classes. They belong to the module of the config, where unpickling finds them.
    """
    stem = config_class.__name__.removesuffix("PeftConfig")
    common: dict[str, Any] = {"method": config_class.method, "__module__": config_class.__module__}
    layer = type(
        f"{stem}TunerLayer", (base.tuner_layer_cls,), {**common, "__doc__": f"The {stem} modules of one block."}
    )
    tuner = type(f"{stem}Model", (base,), {**common, "__doc__": f"The {stem} tuner.", "tuner_layer_cls": layer})
    for made in (layer, tuner):
        setattr(sys.modules[config_class.__module__], made.__name__, made)
    return tuner
