"""All-or-nothing changes of a model with PEFT layers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from pal_adapters.blocks.walk import named_modules
from pal_adapters.hosts.unchanged import all_or_nothing

from .layer import TunerLayer, tuner_layers


def changing(model: nn.Module, *beside: Any, units: bool = True) -> AbstractContextManager[None]:
    """`all_or_nothing` for a model with layers of this package, whose hooks are put back too.

    Args:
        model: the base model, the tuner or the `PeftModel` around it.
        beside: configs and other objects that change with it.
        units: whether the units of the adapters already there may change in more than training modes and
            `requires_grad`. If not, the cost hardly depends on the number of adapters.
    """
    layers = [vars(layer) for _, layer in tuner_layers(model) if isinstance(layer, TunerLayer)]
    modules = None if units else named_modules(model, units=False).values()
    return all_or_nothing(model, layers, *beside, modules=modules)


def switching(model: PeftModel) -> AbstractContextManager[None]:
    """`all_or_nothing` for a change of the active adapter, which touches only what PEFT has put on the model."""
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    touched = [module for module in named_modules(model, units=False).values() if isinstance(module, wrappers)]
    return all_or_nothing(model, modules=[model, model.base_model, *touched])
