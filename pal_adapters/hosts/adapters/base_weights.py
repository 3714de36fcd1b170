"""Which parameters of a model of `adapters` are pretrained, and which adapters train all of them."""

from __future__ import annotations

from typing import Any

from adapters.composition import AdapterCompositionBlock
from adapters.methods.adapter_layer_base import AdapterLayerBase
from torch import nn

from pal_adapters.blocks.walk import named_modules, parameters

from .config import TaskAdapterConfig, task_configs


def trains_base(adapters_config: Any, setup: AdapterCompositionBlock | None) -> bool:
    """Whether an adapter of the setup trains the base model too."""
    names = set() if setup is None else setup.flatten()
    return any(trains_originals(config) for name in names for config in task_configs(adapters_config.get(name)))


def trains_originals(config: TaskAdapterConfig) -> bool:
    """Whether an adapter trains all of the model's own pretrained weights."""
    return config.train_base and config.base_weights == "all"


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The pretrained parameters of a host model by name: all except those that adapters of any method added."""
    task = set(map(id, task_parameters(model)))
    found: dict[str, nn.Parameter] = {}
    for path, module in named_modules(model, units=False).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in task:
                task.add(id(parameter))  # a tied one appears once
                found[f"{path}.{name}" if path else name] = parameter
    return found


def task_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter outside of task units that an adapter, the host's or this package's, added to a base model."""
    containers = [getattr(model, name, None) for name in ("shared_parameters", "invertible_adapters", "prefix_tuning")]
    for module in named_modules(model, units=False).values():
        if isinstance(module, AdapterLayerBase):
            containers.append(module.adapter_modules)
            containers += [getattr(module, name, None) for name in ("adapter_fusion_layer", "shared_parameters")]
    found: list[nn.Parameter] = []
    for container in containers:
        if isinstance(container, nn.Module):
            found += parameters(container, units=False)
    return found
