"""The methods that this package has registered with PEFT."""

from __future__ import annotations

from collections.abc import Mapping

import peft
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.method import Method

_METHODS: dict[str, Method] = {}


def register(method: Method, config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Register a method with PEFT. Idempotent.

    Raises:
        ConfigError: if PEFT or another plugin already uses the name.
    """
    name = method.name.upper()
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(name)  # type: ignore[call-overload]
    if known is config_class:
        return
    if known is not None or name in PeftType.__members__:
        raise ConfigError(f"PEFT already has a method named {name!r} ({known}).")
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    register_peft_method(name=method.name, config_cls=config_class, model_cls=tuner_class)
    _METHODS[name] = method


def methods() -> Mapping[str, Method]:
    """The methods by their `peft_type`."""
    return _METHODS


def method_of(config: PeftConfig) -> Method | None:
    """The method of a config, or None for a method that is not from this package."""
    return _METHODS.get(str(getattr(config.peft_type, "value", config.peft_type)))
