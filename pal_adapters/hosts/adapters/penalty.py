"""The penalties of fusions, in the loss that a model of `adapters` returns in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from adapters.composition import AdapterCompositionBlock, Fuse
from adapters.context import AdapterSetup
from adapters.methods.modeling import BertFusion
from torch import Tensor, nn

from pal_adapters.hooks import penalty

from .fusion import Combination, places


def watch(model: nn.Module) -> None:
    """Make a model add the penalties of its fusions to the loss it returns."""
    layers = (layer for name in model.adapters_config.fusions for _, layer in places(model, name))  # type: ignore[union-attr]
    fusions = (fusion for layer in layers for fusion in layer.adapter_fusion_layer.values())
    if any(isinstance(fusion, Combination) and fusion.penalised for fusion in fusions):
        for module in model.modules():
            penalty.unwatch(module, add_penalty)  # the outermost model computes the loss
        penalty.watch(model, add_penalty)


def add_penalty(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Forward hook: adds the penalties of the active fusions to the loss that a model returns in training."""
    # The host puts its base model into training mode, but not the head model.
    training = module.training or getattr(module, "base_model", module).training
    if not (training and torch.is_grad_enabled()) or penalty.is_by_caller():
        return None
    given = active_penalty(module)
    return None if given is None else penalty.add_to_loss(output, kwargs, given)


def active_penalty(model: nn.Module) -> Tensor | None:
    """The summed penalties of active fusions with trainable coefficients, a scalar, or None if there are none."""
    context = AdapterSetup.get_context()
    setup = model.adapters_config.active_setup if context is None else context.adapter_setup  # type: ignore[union-attr]
    return _summed(
        place.penalty()
        for fuse in fusions_in(setup)
        for _, layer in places(model, fuse.name)
        if isinstance(place := layer.adapter_fusion_layer[fuse.name], Combination)
    )


def penalty_of(model: nn.Module, name: str) -> Tensor | None:
    """The penalty of one fusion with trainable coefficients, a scalar, or None if it has none.

    For the host's AdapterFusion: `0.01 ||I - V||_F^2`, summed over the places. The host's
    `get_fusion_regularization_loss` sums this over all fusions that train.
    """
    return _summed(_penalty(layer.adapter_fusion_layer[name]) for _, layer in places(model, name))


def _penalty(place: Any) -> Tensor | None:
    if isinstance(place, Combination):
        return place.penalty()
    if not isinstance(place, BertFusion) or not place.config["value"]:
        return None
    weight = place.value.weight
    if not weight.requires_grad:
        return None
    return 0.01 * (torch.eye(len(weight), device=weight.device, dtype=weight.dtype) - weight).pow(2).sum()


def _summed(terms: Iterable[Tensor | None]) -> Tensor | None:
    total: Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term.to(total.device)
    return total


def fusions_in(setup: AdapterCompositionBlock | str | None) -> Iterator[Fuse]:
    """The `Fuse` blocks of a setup."""
    if isinstance(setup, Fuse):
        yield setup
    elif isinstance(setup, AdapterCompositionBlock):
        for child in setup:
            yield from fusions_in(child)
