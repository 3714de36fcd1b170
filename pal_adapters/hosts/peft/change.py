"""All-or-nothing changes of a model with PEFT layers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from pal_adapters.hosts.unchanged import all_or_nothing

from .layer import TunerLayer, tuner_layers


def changing(model: nn.Module, *beside: Any) -> AbstractContextManager[None]:
    """`all_or_nothing` for a model with layers of this package, whose hooks are put back too.

    Args:
        model: the base model, the tuner or the `PeftModel` around it.
        beside: configs and other objects that change with it.
    """
    layers = [vars(layer) for _, layer in tuner_layers(model) if isinstance(layer, TunerLayer)]
    return all_or_nothing(model, layers, *beside)
