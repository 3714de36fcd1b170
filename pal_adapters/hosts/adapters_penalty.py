"""The penalties of fusions on their coefficients, in the loss that a model of `adapters` returns in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from adapters.composition import AdapterCompositionBlock, Fuse
from adapters.context import AdapterSetup
from torch import Tensor, nn

from . import penalty
from .adapters_fusion import Combination, places


def watch(model: nn.Module) -> None:
    """Have a model add the penalties of its fusions to the loss that it returns."""
    layers = (layer for name in model.adapters_config.fusions for _, layer in places(model, name))  # type: ignore[union-attr]
    fusions = (fusion for layer in layers for fusion in layer.adapter_fusion_layer.values())
    if any(isinstance(fusion, Combination) and fusion.penalised for fusion in fusions):
        for module in model.modules():
            penalty.unwatch(module, add_penalty)  # the outermost model has the loss
        penalty.watch(model, add_penalty)


def add_penalty(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Forward hook: the penalty of the active fusions is part of the loss that a model returns in training."""
    # The host puts its base model into training mode, not the one around it.
    training = module.training or getattr(module, "base_model", module).training
    if not (training and torch.is_grad_enabled()):
        return None
    given = active_penalty(module)
    return None if given is None else penalty.add_to_loss(output, kwargs, given)


def active_penalty(model: nn.Module) -> Tensor | None:
    """The penalties of the active fusions whose coefficients train, a scalar, or None where there is none."""
    context = AdapterSetup.get_context()
    setup = model.adapters_config.active_setup if context is None else context.adapter_setup  # type: ignore[union-attr]
    total: Tensor | None = None
    for fuse in fusions_in(setup):
        for _, layer in places(model, fuse.name):
            place = layer.adapter_fusion_layer[fuse.name]
            given = place.penalty() if isinstance(place, Combination) else None
            if given is not None:
                total = given if total is None else total + given.to(total.device)
    return total


def fusions_in(setup: AdapterCompositionBlock | str | None) -> Iterator[Fuse]:
    """The `Fuse` blocks of a setup."""
    if isinstance(setup, Fuse):
        yield setup
    elif isinstance(setup, AdapterCompositionBlock):
        for child in setup:
            yield from fusions_in(child)
