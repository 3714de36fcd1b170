"""The host's bottlenecks as sources of a fusion: their outputs, several as one wide one, and which cannot be fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from adapters.configuration import BnConfig
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Activation_Function_Class, Adapter, ParallelAdapter
from torch import Tensor, nn

from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.nn.bottleneck import Bottleneck, widen

from .config import fusable_methods, task_configs


class WideSources:
    """Bottlenecks of the host that differ only in their widths and weights.

    Weights are read at each call and never cached, since they may change in place.
    """

    def __init__(self, adapters: tuple[Adapter, ...]) -> None:
        self.adapters = adapters
        plain = all(type(module) is nn.Linear for a in adapters for module in (down_of(a), a.adapter_up))
        normed = any(a.add_layer_norm_before for a in adapters)
        self._alike = plain and not normed and unlike(adapters) is None
        self._scaled = any(not isinstance(a.scaling, float) or a.scaling != 1.0 for a in adapters)
        self._parts = [module for adapter in adapters for module in adapter.modules()]
        self._linears: list[tuple[Any, Any]] = [(down_of(a), a.adapter_up) for a in adapters]

    def usable(self) -> bool:
        """Whether a wide bottleneck computes the same now: no source has active dropout or hooks."""
        return (
            self._alike
            and not any(a.training and (a.dropout.p > 0 or hasattr(a, "DropPath")) for a in self.adapters)
            and not any(m._forward_hooks or m._forward_pre_hooks for m in self._parts)
        )

    def __call__(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """The sum of what the sources add, `[b, n, d]`, for their input `x` `[b, n, d]`."""
        if self._scaled:
            coefficients = coefficients * torch.stack([scaling_of(a) for a in self.adapters])
        sources = [Bottleneck(down.weight, down.bias, up.weight, up.bias) for down, up in self._linears]
        return widen(sources, coefficients)(x, self.adapters[0].non_linearity)


def scaling_of(adapter: Adapter) -> Tensor:
    """The factor applied after the up-projection, `[d]`."""
    if isinstance(adapter.scaling, float):
        return next(adapter.adapter_up.parameters()).new_full((adapter.input_size,), adapter.scaling)
    return adapter.scaling.expand(adapter.input_size)


def unlike(adapters: Sequence[Adapter]) -> str | None:
    """Why no single bottleneck computes the sum of these sources, or None."""
    if any(a.use_gating for a in adapters):
        return "a source has a gate, which depends on the input"
    if any(a.add_layer_norm_after for a in adapters):
        return "a source is followed by a layer norm"
    if len({type(a) for a in adapters}) > 1:
        return "some sources are parallel and others sequential"
    if len({(a.original_ln_before, a.residual_before_ln) for a in adapters}) > 1:
        return "the sources differ in original_ln_before or residual_before_ln and therefore read different values"
    if len({a.original_ln_after for a in adapters}) > 1:
        return "the sources differ in original_ln_after"
    if len({_function_key(a.non_linearity) for a in adapters}) > 1:
        return "the sources differ in their non-linearity"
    if any(True for a in adapters for _ in a.non_linearity.parameters()):
        return "a source has a non-linearity with parameters"
    return None


def down_of(adapter: Adapter) -> nn.Module:
    """The down-projection, which some configs put after a norm."""
    return adapter.adapter_down[int(adapter.add_layer_norm_before)]


def _function_key(function: Activation_Function_Class) -> object:
    inner = function.f
    return (type(inner), repr(inner)) if isinstance(inner, nn.Module) else inner


def added(layer: BottleneckLayer, name: str, x: Tensor, residual: Tensor) -> Tensor:
    """What a bottleneck adds to its residual, `[b, n, d]`, with its gate, norm and dropout."""
    adapter = layer.adapters[name]
    context = ForwardContext.get_context()
    gating = bool(context is not None and context.output_adapter_gating_scores)
    if isinstance(adapter, ParallelAdapter):
        output = adapter(x, residual, output_gating=gating)
        term = output[0]
    elif adapter.adapter_residual_before_ln and adapter.add_layer_norm_after:
        output = adapter(x, residual, output_gating=gating)
        term = output[0] - residual
    else:
        output = adapter(x, torch.zeros_like(residual), output_gating=gating)
        term = output[0]
    if gating and adapter.use_gating:
        layer._store_gating_score(name, output[-1])
    return term


def check_sources(adapters_config: Any, names: Sequence[str]) -> None:
    """Check that adapters with these names can be the sources of one fusion.

    Raises:
        ConfigError: without sources, or if one is named twice.
        UnknownAdapterError: for a name that is not on the model.
        UnsupportedError: for an adapter without a term that a coefficient could weigh, or with an invertible part, or
            for sources that end a block in different ways.
    """
    if not names:
        raise ConfigError("a fusion needs at least one source: pass Fuse('a', 'b') with adapter names.")
    for name in names:
        if list(names).count(name) > 1:
            raise ConfigError(f"{name!r} is named twice in Fuse({', '.join(names)}): name each source once.")
        if name not in adapters_config:
            raise UnknownAdapterError(
                f"the model has no adapter {name!r}: use one of {', '.join(adapters_config) or '(none)'}."
            )
    ends, ours = {}, False
    for name in names:
        config = adapters_config.match(name, BnConfig)
        whole = adapters_config.get(name)
        if any(True for _ in task_configs(whole)):
            ours = True
        elif config is None or config.get("architecture") is not None or whole.get("architecture") == "union":
            raise UnsupportedError(
                f"{name!r} ({type(whole).__name__}) cannot be a source of a fusion: it does not add a term "
                f"after a sub-layer. Fuse bottlenecks, or adapters of type {', '.join(fusable_methods())}."
            )
        if config is not None and config["inv_adapter"] is not None:
            raise UnsupportedError(
                f"{name!r} ({type(whole).__name__}) cannot be a source of a fusion: its invertible part acts on the "
                f"embeddings, where no coefficient can weigh it. Stack it in front: Stack({name!r}, Fuse(...))."
            )
        if config is not None:
            before = True if config["is_parallel"] else config["residual_before_ln"]
            ends[name] = (before, config["original_ln_after"])
    if len(set(ends.values())) > 1 or (ours and any(end != (True, True) for end in ends.values())):
        raise UnsupportedError(
            f"Fuse({', '.join(names)}) cannot be used: the sources differ in residual_before_ln or original_ln_after "
            "and have no residual in common. Fuse sources that agree in both"
            + (", with True beside task modules." if ours else ".")
        )
