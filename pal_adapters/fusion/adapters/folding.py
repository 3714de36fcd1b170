"""Folding in `adapters`: a ScaLearn fusion of bottlenecks becomes one of the host's bottlenecks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

import torch
from adapters.composition import Fuse
from adapters.configuration import BnConfig
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Adapter, PHMLayer
from torch import Tensor, nn

from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.fusion.measuring import evaluating, moments_of_data
from pal_adapters.fusion.truncation import cut_to_width, moments, noise
from pal_adapters.fusion.types import Folded
from pal_adapters.hosts.adapters.config import task_configs
from pal_adapters.hosts.adapters.fusion import Combination, combination_config, fusion_name, place_names, places
from pal_adapters.hosts.adapters.sources import down_of, scaling_of, unlike
from pal_adapters.hosts.adapters.transactions import changing
from pal_adapters.hosts.names import require_adapter_name
from pal_adapters.nn.bottleneck import Bottleneck, widen


def fold_adapters(
    model: Any,
    fusion: Fuse | str | None,
    name: str | None,
    truncate: int | None,
    data: Iterable[Mapping[str, Any]] | None,
) -> Folded:
    """See `pal_adapters.fold`."""
    key = fusion_name(model, fusion)
    require_adapter_name("name", name)
    assert name is not None
    if name in model.adapters_config:
        raise ConfigError(f"name={name!r} is not allowed: the model has an adapter with that name.")
    _, sources = model.adapters_config.get_fusion(key)
    _check_sources(model, key, sources)
    with changing(model):
        return _fold(model, key, name, sources, truncate, data)


def check_fold_adapters(model: Any, fusion: Fuse | str | None) -> None:
    """See `pal_adapters.check_fold`."""
    key = fusion_name(model, fusion)
    _check_sources(model, key, model.adapters_config.get_fusion(key)[1])
    with torch.no_grad(), _context(model):
        for index, layer in places(model, key):
            _fold_place(layer, key, index)


def _fold(
    model: Any,
    key: str,
    name: str,
    sources: list[str],
    truncate: int | None,
    data: Iterable[Mapping[str, Any]] | None,
) -> Folded:
    with torch.no_grad(), _context(model):
        layers = list(places(model, key))
        folded = {layer: _fold_place(layer, key, index) for index, layer in layers}
    wide = {layer: weights for layer, weights in folded.items() if weights is not None}
    labels = {layer: label for (_, layer), label in zip(layers, place_names(layers), strict=True)}
    config = model.adapters_config.match(sources[0], BnConfig)
    _add(model, name, config, wide)
    errors: dict[BottleneckLayer, float] = {}
    if truncate is not None:
        wide = _truncate(model, name, wide, truncate, data, errors)
        model.delete_adapter(name)
        _add(model, name, config, wide)
    return Folded(
        name,
        {labels[layer]: weights.up.shape[1] for layer, weights in wide.items()},
        {labels[layer]: error for layer, error in errors.items()},
    )


def _check_sources(model: Any, key: str, sources: list[str]) -> None:
    no_fold = f"the fusion {key!r} has no exact fold: "
    config, _ = model.adapters_config.get_fusion(key)
    if combination_config(config) is None:
        raise UnsupportedError(
            f"{no_fold}AdapterFusion attends over its sources, so their weights depend on the input. Fold a "
            "ScaLearn fusion."
        )
    for name in sources:
        whole = model.adapters_config.get(name)
        if whole is None:
            raise UnknownAdapterError(f"{no_fold}its source {name!r} is no longer on the model.")
        ours = [c.architecture for c in task_configs(whole)]
        if ours:
            raise UnsupportedError(
                f"{no_fold}{name!r} ({ours[0]}) is not a bottleneck: it attends, or acts elsewhere."
            )


def _fold_place(layer: BottleneckLayer, key: str, index: int) -> Bottleneck | None:
    combination: Combination = layer.adapter_fusion_layer[key]
    rows = [row for row, name in enumerate(combination.names) if name in layer.adapters]
    if not rows:
        return None
    adapters = [layer.adapters[combination.names[row]] for row in rows]
    no_fold = f"the fusion {key!r} has no exact fold: in block {index}, "
    reason = unlike(adapters)
    if reason is not None:
        raise UnsupportedError(f"{no_fold}{reason}.")
    if len({a.add_layer_norm_before for a in adapters}) > 1:
        raise UnsupportedError(f"{no_fold}the sources differ in ln_before.")
    with evaluating(combination):
        coefficients = combination()[rows].double()
    scales = torch.stack([scaling_of(a) for a in adapters]).double()
    return widen([_weights(a, no_fold) for a in adapters], coefficients * scales.to(coefficients.device))


def _weights(adapter: Adapter, no_fold: str) -> Bottleneck:
    """The weights in float64; those of a preceding norm are absorbed into the down-projection."""
    down, down_bias = _linear(down_of(adapter), adapter.input_size, no_fold)
    up, up_bias = _linear(adapter.adapter_up, adapter.down_sample, no_fold)
    if adapter.add_layer_norm_before:
        norm = adapter.adapter_norm_before
        down_bias = down_bias + down @ norm.bias.double()
        down = down * norm.weight.double()
    return Bottleneck(down, down_bias, up, up_bias)


def _linear(module: nn.Module, width: int, no_fold: str) -> tuple[Tensor, Tensor]:
    if type(module) is nn.Linear:
        return module.weight.double(), module.bias.double()
    if not isinstance(module, PHMLayer):
        raise UnsupportedError(f"{no_fold}a projection is a {type(module).__name__}, not a plain linear map.")
    inputs = torch.cat([torch.eye(width), torch.zeros(1, width)]).to(next(module.parameters()))
    outputs = module(inputs).double()  # Compacter's matrix is a sum of Kronecker products
    return (outputs[:-1] - outputs[-1]).t(), outputs[-1]


def _context(model: Any) -> ForwardContext:
    context = ForwardContext(None)
    context.shared_parameters = model.base_model.shared_parameters
    return context


def _add(model: Any, name: str, source: BnConfig, wide: Mapping[BottleneckLayer, Bottleneck]) -> None:
    hidden = next(iter(wide.values())).up.shape[0]
    indices = {index for index, _ in model.iter_layers()}
    widths = {layer.layer_idx: weights.up.shape[1] for layer, weights in wide.items()}
    factors = {str(index): _reduction_factor(hidden, width) for index, width in widths.items()}
    values = {
        **{k: v for k, v in source.to_dict().items() if k in BnConfig.__dataclass_fields__},
        "reduction_factor": next(iter(factors.values())) if len(set(factors.values())) == 1 else factors,
        "leave_out": sorted(indices - widths.keys()),
        "scaling": 1.0,
        "dropout": 0.0,
        "stochastic_depth": 0.0,
        "phm_layer": False,
        "shared_phm_rule": False,
        "shared_W_phm": False,
        "init_weights": "bert",
        "init_weights_seed": None,
    }
    model.add_adapter(name, config=BnConfig.from_dict(values))
    for layer, weights in wide.items():
        adapter = layer.adapters[name]
        adapter.to(next(p for n, a in layer.adapters.items() if n != name for p in a.parameters()))
        with torch.no_grad():
            linear = down_of(adapter)
            targets = (linear.weight, linear.bias, adapter.adapter_up.weight, adapter.adapter_up.bias)
            for target, value in zip(targets, weights, strict=True):
                assert target.shape == value.shape
                target.copy_(value)


def _reduction_factor(hidden: int, width: int) -> float:
    """A reduction factor for which the host computes exactly this width."""
    factor = hidden / width
    # The host rounds down, so aim for the middle of the interval.
    return factor if int(hidden // factor) == width else hidden / (width + 0.5)


def _truncate(
    model: Any,
    name: str,
    wide: Mapping[BottleneckLayer, Bottleneck],
    width: int,
    data: Iterable[Mapping[str, Any]] | None,
    errors: dict[BottleneckLayer, float],
) -> dict[BottleneckLayer, Bottleneck]:
    if data is None:
        found = {layer: _moments_of_noise(layer.adapters[name]) for layer in wide}
    else:
        found = _moments_of_data(model, name, list(wide), data)
    cut = {}
    for layer, weights in wide.items():
        if weights.up.shape[1] <= width:
            cut[layer] = weights
        else:
            cut[layer], errors[layer] = cut_to_width(weights, found[layer], width)
    return cut


def _moments_of_noise(adapter: Adapter) -> Tensor:
    with torch.no_grad():
        return moments(adapter.adapter_down(noise(adapter.input_size, adapter.adapter_up.weight)))


def _moments_of_data(
    model: Any, name: str, layers: list[BottleneckLayer], data: Iterable[Mapping[str, Any]]
) -> dict[BottleneckLayer, Tensor]:
    setup = model.active_adapters
    try:
        model.set_active_adapters(name)
        return moments_of_data(model, {m: (m.adapters[name].adapter_up, itemgetter(0)) for m in layers}, data)
    finally:
        model.adapters_config.active_setup = setup
