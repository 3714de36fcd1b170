"""Changes of a model with PEFT layers that happen whole or not at all."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.unchanged import all_or_nothing

from .layer import TunerLayer, tuner_layers

BASE = "__base__"
"""What `adapter_names` calls the model without an adapter."""


def changing(model: nn.Module, *beside: Any) -> AbstractContextManager[None]:
    """`all_or_nothing` for a model with layers of this package, whose hooks are put back too.

    Args:
        model: the base model, the tuner or the `PeftModel` around it.
        beside: configs and other objects that change with it.
    """
    layers = [vars(layer) for _, layer in tuner_layers(model) if isinstance(layer, TunerLayer)]
    return all_or_nothing(model, layers, *beside)


def check_adapter_name(name: Any) -> None:
    """Raise `ConfigError` for an adapter name that PyTorch or PEFT reserves."""
    if not isinstance(name, str) or not name or "." in name or name == BASE or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"adapter_name={name!r} is not allowed: use a non-empty string without dots that is neither {BASE!r}, "
            "which adapter_names uses for the base model, nor an attribute of torch.nn.ModuleDict."
        )
