"""Folding of Houlsby sources into one Houlsby adapter, in PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from pal_adapters.fusion.measuring import moments_of_data
from pal_adapters.fusion.truncation import cut_to_width, moments, noise
from pal_adapters.fusion.units import CombinedUnit, NormCopies, StackedSources
from pal_adapters.methods.houlsby.peft import HoulsbyPeftConfig
from pal_adapters.nn.bottleneck import Bottleneck

from .layers import VALUE, FusionLayer, FusionNormLayer
from .sources import PREFIX, innermost


def fold_houlsby(
    model: PeftModel,
    found: list[tuple[str, FusionLayer, CombinedUnit]],
    truncate: int | None,
    data: Iterable[Mapping[str, Any]] | None,
    common: Mapping[str, Any],
) -> tuple[HoulsbyPeftConfig, dict[str, Tensor], dict[str, float]]:
    """Config, tensors and truncation errors of the Houlsby adapter."""
    bottles: dict[str, dict[str, Tensor]] = {}
    norms: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    activation = "gelu_new"
    sums = {} if data is None else _moments(model, [unit for _, _, unit in found], data)
    for place, layer, unit in found:
        group, omega = unit.groups[0], unit.learned(VALUE)
        if isinstance(layer, FusionNormLayer):
            assert isinstance(group, NormCopies)
            own = dict(innermost(layer.base_layer).named_parameters(recurse=False))
            norms[place] = group.weights(omega, own)
            continue
        assert isinstance(group, StackedSources)
        assert group.down_bias is not None
        assert group.activations is not None
        activation = group.activations[0]
        up, bias = group.scaled(omega.to(group.up.device))
        assert bias is not None
        down, down_bias, up = group.down, group.down_bias, up.T
        if truncate is not None and truncate < down.shape[0]:
            measured = sums[unit] if data is not None else moments(group.hidden(noise(down.shape[1], down)))
            (down, down_bias, up, bias), errors[place] = cut_to_width(
                Bottleneck(down, down_bias, up, bias), measured, truncate
            )
        bottles[place] = {"down.weight": down, "down.bias": down_bias, "up.weight": up, "up.bias": bias}
    width = max((b["down.bias"].shape[0] for b in bottles.values()), default=1)
    weights: dict[str, Tensor] = {}
    for place, bottle in bottles.items():
        for key, value in _padded(bottle, width).items():
            weights[f"{PREFIX}{place}.houlsby.houlsby_units.{key}"] = value
    for place, norm in norms.items():  # a norm without copies becomes a copy of the base model's
        for key, value in norm.items():
            weights[f"{PREFIX}{place}.houlsby_norms.{key}"] = value
    folded = HoulsbyPeftConfig(
        hidden_size=width,
        activation=activation,
        target_modules=list(bottles),
        train_layernorm=bool(norms),
        **common,
    )
    return folded, {key: value.detach().clone().contiguous() for key, value in weights.items()}, errors


def _moments(
    model: PeftModel, units: Iterable[CombinedUnit], data: Iterable[Mapping[str, Any]]
) -> dict[CombinedUnit, Tensor]:
    """The moments of the sources' hidden values at each place."""
    read = {
        unit: (unit, lambda args, group=group: group.hidden(args[1]))
        for unit in units
        if isinstance(group := unit.groups[0], StackedSources)
    }
    return moments_of_data(model, read, data)


def _padded(bottle: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Padded with zero units: an adapter has one width, but fewer sources may adapt a module."""
    missing = width - bottle["down.bias"].shape[0]
    pad = torch.nn.functional.pad
    return {
        "down.weight": pad(bottle["down.weight"], (0, 0, 0, missing)),
        "down.bias": pad(bottle["down.bias"], (0, missing)),
        "up.weight": pad(bottle["up.weight"], (0, missing)),
        "up.bias": bottle["up.bias"],
    }
