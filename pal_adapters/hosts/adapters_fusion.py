"""Fusions in `adapters` that weigh their sources with coefficients which do not depend on the input.

The layer of such a fusion lives where the host's own does, `adapter_fusion_layer.<name>` of a `BottleneckLayer`, so
that the host saves, loads, renames, moves, trains and deletes it. What its sources add is computed here: as one wide
bottleneck where the sources are alike, one after the other where they are not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from adapters.composition import AdapterCompositionBlock, Fuse
from adapters.configuration import AdapterFusionConfig, BnConfig
from adapters.context import AdapterSetup, ForwardContext
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from adapters.methods.modeling import Activation_Function_Class, Adapter, ParallelAdapter
from torch import Tensor, nn

from ..bottlenecks import Bottleneck, widen
from ..errors import ConfigError, UnknownAdapterError, UnsupportedError
from .adapters_config import task_configs
from .penalty import is_by_caller

# The config class of each fusion by its architecture; `adapters.register_fusion` fills it.
FUSIONS: dict[str, type[CombinationConfig]] = {}


@dataclass(eq=False)
class CombinationConfig(AdapterFusionConfig):
    """Base of our fusion configs: `architecture` tells them apart in a file, which the host reads as its own class."""

    def build(self, names: Sequence[str], width: int) -> Combination:
        """The layer for these sources at one place of width `d`."""
        raise NotImplementedError


class Combination(nn.Module):
    """Base of the layers. `forward()` gives the coefficients of this call, `[S, d]` or `[S, 1]`, rows as `names`."""

    names: tuple[str, ...]
    shared: bool
    penalised: bool = False
    _wide: WideSources | None = None

    def share(self, owner: Combination) -> None:
        """Use the coefficients of another place from now on; they are registered there alone."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """What this place adds to the loss in training, or None."""
        return None

    def rows(self, setup: Fuse) -> list[tuple[int, Any]]:
        """The children of a `Fuse`, each with the row of its coefficients."""
        children = [child if isinstance(child, str) else child.last() for child in setup]
        if sorted(children) != sorted(self.names):
            raise UnsupportedError(
                f"Fuse({', '.join(children)}) cannot be used with the fusion {setup.name!r}, which has coefficients "
                f"for {', '.join(self.names)}: use the same sources."
            )
        return [(self.names.index(name), child) for name, child in zip(children, setup, strict=True)]

    def wide(self, adapters: Sequence[Adapter]) -> WideSources | None:
        """These sources as one wide bottleneck, or None where they differ."""
        known = self._wide
        if known is None or len(known.adapters) != len(adapters) or any(map(_differ, known.adapters, adapters)):
            known = self._wide = WideSources(tuple(adapters))
        return known if known.usable() else None


def _differ(a: object, b: object) -> bool:
    return a is not b


class WideSources:
    """Bottlenecks of the host, alike but for their widths and weights.

    Weights are read at each call and never kept: they may change in place.
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
        """Whether a wide bottleneck gives what the sources give now: they must neither drop out nor be hooked."""
        return (
            self._alike
            and not any(a.training and (a.dropout.p > 0 or hasattr(a, "DropPath")) for a in self.adapters)
            and not any(m._forward_hooks or m._forward_pre_hooks for m in self._parts)
        )

    def __call__(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """`[b, n, d]`, what the sources add together for their input `x` `[b, n, d]`."""
        if self._scaled:
            coefficients = coefficients * torch.stack([scaling_of(a) for a in self.adapters])
        sources = [Bottleneck(down.weight, down.bias, up.weight, up.bias) for down, up in self._linears]
        return widen(sources, coefficients)(x, self.adapters[0].non_linearity)


def scaling_of(adapter: Adapter) -> Tensor:
    """The factor behind the up-projection, `[d]`."""
    if isinstance(adapter.scaling, float):
        return next(adapter.adapter_up.parameters()).new_full((adapter.input_size,), adapter.scaling)
    return adapter.scaling.expand(adapter.input_size)


def unlike(adapters: Sequence[Adapter]) -> str | None:
    """Why no single bottleneck can give what these sources give, or None."""
    if any(a.use_gating for a in adapters):
        return "a source has a gate, which depends on the input"
    if any(a.add_layer_norm_after for a in adapters):
        return "a source has a layer norm behind it"
    if len({type(a) for a in adapters}) > 1:
        return "some sources are parallel and others sequential"
    if len({(a.original_ln_before, a.residual_before_ln) for a in adapters}) > 1:
        return "the sources differ in original_ln_before or residual_before_ln, so that they read different values"
    if len({a.original_ln_after for a in adapters}) > 1:
        return "the sources differ in original_ln_after"
    if len({_function_key(a.non_linearity) for a in adapters}) > 1:
        return "the sources differ in their non-linearity"
    if any(True for a in adapters for _ in a.non_linearity.parameters()):
        return "a source has a non-linearity with weights of its own"
    return None


def down_of(adapter: Adapter) -> nn.Module:
    """The down-projection, behind the norm that some configs put in front of it."""
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


# The forward pass


def compose(layer: BottleneckLayer, setup: Fuse, state: BottleneckState, lvl: int) -> BottleneckState:
    """The sum of the sources' terms, times their coefficients, on the residual of a single bottleneck."""
    combination: Combination = layer.adapter_fusion_layer[setup.name]
    present = [(row, child) for row, child in combination.rows(setup) if _names(child) & layer.adapters.keys()]
    if not present:  # all left out in this block
        return state
    last = _last(present[-1][1], layer)
    parallel = isinstance(layer.adapters[last], ParallelAdapter)
    if state.last is not None and isinstance(layer.adapters[state.last], ParallelAdapter) is not parallel:
        raise UnsupportedError(
            f"Stack({state.last}, {setup}) cannot be used: adapters closes a block in one way for sequential and in "
            "another for parallel bottlenecks. Stack sources of one kind."
        )
    coefficients = combination()
    if len(present) < len(combination.names) or [row for row, _ in present] != list(range(len(present))):
        coefficients = coefficients[[row for row, _ in present]]
    total, residual = _total(layer, combination, coefficients, [child for _, child in present], setup, state, lvl)
    if not parallel:
        total = residual + total
    elif state.last is not None:
        total = state.hidden_states + total
    return state._replace(hidden_states=total, last=last)


def _total(
    layer: BottleneckLayer,
    combination: Combination,
    coefficients: Tensor,
    children: list[Any],
    setup: Fuse,
    state: BottleneckState,
    lvl: int,
) -> tuple[Tensor, Tensor]:
    if all(isinstance(child, str) for child in children):
        adapters = [layer.adapters[child] for child in children]
        wide = combination.wide(adapters)
        if wide is not None:
            x, _, residual = adapters[-1].pre_forward(state.hidden_states, state.input_tensor, state.layer_norm)
            return wide(x, coefficients), residual
    terms, residual = [], state.hidden_states
    for child in children:
        if isinstance(child, str):
            adapter = layer.adapters[child]
            x, _, own = adapter.pre_forward(state.hidden_states, state.input_tensor, state.layer_norm)
            terms.append(added(layer, child, x, own))
            residual = state.hidden_states if isinstance(adapter, ParallelAdapter) else own
        else:
            layer.check_composition_valid(setup, child, lvl)
            after = layer._get_compose_func(type(child))(child, state, lvl=lvl + 1)
            terms.append(after.hidden_states - state.hidden_states)
    return weigh(coefficients, terms), residual


def weigh(coefficients: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """`[b, n, d]`, the weighted sum of as many `[b, n, d]` as there are rows of coefficients."""
    stacked = torch.stack(list(terms), -2)
    return (coefficients.to(stacked.dtype) * stacked).sum(-2)


def _names(child: Any) -> set[str]:
    return {child} if isinstance(child, str) else child.flatten()


def _last(child: Any, layer: BottleneckLayer) -> str:
    if isinstance(child, str):
        return child
    return [name for name in child if name in layer.adapters][-1]


# Adding a fusion


def combination_config(config: Any) -> CombinationConfig | None:
    """The config of one of our fusions, from what the host may have read as a dict or as its own class, or None."""
    if isinstance(config, CombinationConfig):
        return config
    if not isinstance(config, Mapping):
        return None
    ours = FUSIONS.get(config.get("architecture") or "")
    return None if ours is None else ours.from_dict(dict(config))


def check_sources(adapters_config: Any, names: Sequence[str]) -> None:
    """Whether adapters of these names can be sources of one fusion.

    Raises:
        ConfigError: for no source at all, or for one that is named twice.
        UnknownAdapterError: for a name that is not on the model.
        UnsupportedError: for an adapter that adds nothing a coefficient could weigh, or for sources that end a block
        in
            different ways.
    """
    if not names:
        raise ConfigError("a fusion needs at least one source: pass Fuse('a', 'b') with names of adapters.")
    for name in names:
        if list(names).count(name) > 1:
            raise ConfigError(f"{name!r} is named twice in Fuse({', '.join(names)}): name each source once.")
        if name not in adapters_config:
            raise UnknownAdapterError(
                f"no adapter with the name {name!r} on the model: use one of {', '.join(adapters_config) or '(none)'}."
            )
    ends, ours = {}, False
    for name in names:
        config = adapters_config.match(name, BnConfig)
        whole = adapters_config.get(name)
        if any(True for _ in task_configs(whole)):
            ours = True
        elif config is None or config.get("architecture") is not None or whole.get("architecture") == "union":
            raise UnsupportedError(
                f"{name!r} ({type(whole).__name__}) cannot be a source of a fusion: it is no bottleneck and adds no "
                "term behind a sub-layer. Fuse adapters of type pal, low_rank or a bottleneck."
            )
        if config is not None:
            before = True if config["is_parallel"] else config["residual_before_ln"]
            ends[name] = (before, config["original_ln_after"])
    if len(set(ends.values())) > 1 or (ours and any(end != (True, True) for end in ends.values())):
        raise UnsupportedError(
            f"Fuse({', '.join(names)}) cannot be used: the sources differ in residual_before_ln or original_ln_after, "
            "so that no single residual fits them. Fuse sources that agree in both"
            + (", True beside task modules." if ours else ".")
        )


def add_layer(layer: BottleneckLayer, name: str, config: CombinationConfig, names: Sequence[str]) -> None:
    """Give a bottleneck layer its part of a fusion, if the sources act there."""
    if not layer.adapters_config.common_config_value(names, layer.location_key):
        return
    combination = config.build(names, layer.model_config.hidden_size).train(layer.training)
    here = next(iter(layer.adapters[n] for n in names if n in layer.adapters), None)
    if here is not None:
        combination.to(next(here.parameters()).device)
    layer.adapter_fusion_layer[name] = combination


def places(model: nn.Module, name: str) -> Iterator[tuple[int, BottleneckLayer]]:
    """The bottleneck layers that have a part of a fusion, with the index of their block."""
    for index, block in model.iter_layers():  # type: ignore[operator]
        for module in block.modules():
            if isinstance(module, BottleneckLayer) and name in module.adapter_fusion_layer:
                yield index, module


def place_names(layers: Sequence[tuple[int, BottleneckLayer]]) -> list[str]:
    """`0.output_adapter`, ... for what `places` gives; `encoder.0.output_adapter`, ... where a decoder counts anew."""
    keys = [f"{index}.{layer.location_key}" for index, layer in layers]
    if len(set(keys)) == len(keys):
        return keys
    parts = ["encoder" if key not in keys[:i] else "decoder" for i, key in enumerate(keys)]
    return [f"{part}.{key}" for part, key in zip(parts, keys, strict=True)]


def link(model: nn.Module) -> None:
    """Make the places of each fusion whose coefficients are shared use those of the first."""
    for name in model.adapters_config.fusions:  # type: ignore[union-attr]
        ours = [layer.adapter_fusion_layer[name] for _, layer in places(model, name)]
        ours = [layer for layer in dict.fromkeys(ours) if isinstance(layer, Combination) and layer.shared]
        for other in ours[1:]:
            other.share(ours[0])


# The penalty on coefficients


def watch(model: nn.Module) -> None:
    """Have a model add the penalties of its fusions to the loss that it returns."""
    layers = (layer for name in model.adapters_config.fusions for _, layer in places(model, name))  # type: ignore[union-attr]
    fusions = (fusion for layer in layers for fusion in layer.adapter_fusion_layer.values())
    if any(isinstance(fusion, Combination) and fusion.penalised for fusion in fusions):
        for module in model.modules():
            unwatch(module)  # the outermost model has the loss
        model.register_forward_hook(add_penalty, with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Undo `watch`."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is add_penalty]:
        module._forward_hooks.pop(key)
        module._forward_hooks_with_kwargs.pop(key, None)


def add_penalty(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Forward hook: the loss that a model returns in training, and so what is scaled and divided, has the penalty."""
    # The host puts its base model into training mode, not the one around it.
    training = module.training or getattr(module, "base_model", module).training
    if not (training and torch.is_grad_enabled()) or is_by_caller():
        return None
    penalty = active_penalty(module)
    if penalty is None:
        return None
    if isinstance(output, tuple):
        if kwargs.get("labels") is not None:
            return (output[0] + penalty.to(output[0].device), *output[1:])
    elif getattr(output, "loss", None) is not None:
        output.loss = output.loss + penalty.to(output.loss.device)
        return output
    warnings.warn(
        "the model returned no loss, so the fusion's regularization is not part of it: pass labels, or add "
        "pal_adapters.fusion_regularization(model) to your own loss.",
        stacklevel=2,
    )
    return None


def active_penalty(model: nn.Module) -> Tensor | None:
    """The penalties of the active fusions whose coefficients train, a scalar, or None where there is none."""
    given = AdapterSetup.get_context()
    setup = model.adapters_config.active_setup if given is None else given.adapter_setup  # type: ignore[union-attr]
    return _summed(
        place.penalty()
        for fuse in fusions_in(setup)
        for _, layer in places(model, fuse.name)
        if isinstance(place := layer.adapter_fusion_layer[fuse.name], Combination)
    )


def penalty_of(model: nn.Module, name: str) -> Tensor | None:
    """The penalty of one fusion, whose coefficients train, a scalar, or None where there is none.

    For a fusion of the host's own kind, `0.01 ||I - V||_F^2` summed over the places: its part of what
    `get_fusion_regularization_loss` gives, which is over all fusions that train.
    """
    return _summed(_penalty(layer.adapter_fusion_layer[name]) for _, layer in places(model, name))


def _penalty(place: nn.Module) -> Tensor | None:
    if isinstance(place, Combination):
        return place.penalty()
    value = getattr(place, "value", None)
    if not isinstance(value, nn.Linear) or not value.weight.requires_grad:
        return None
    weight = value.weight
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


# Files


def check_file(model: Any, config: Mapping[str, Any], name: str) -> CombinationConfig | None:
    """Whether a fusion read from a file may overwrite the one of this name; its config if it is one of ours.

    Raises:
        ConfigError: if the model has another kind of fusion, or one over other sources, under this name.
    """
    ours = combination_config(config.get("config"))
    if name not in model.adapters_config.fusions:
        return ours
    known, names = model.adapters_config.get_fusion(name)
    known = combination_config(known)
    if known is None and ours is None:
        return None
    if known is None or ours is None or known != ours or list(config.get("adapter_names", names)) != list(names):
        raise ConfigError(
            f"the model has another fusion with the name {name!r}: delete it with delete_adapter_fusion, or pass "
            "load_as."
        )
    return ours


def coefficients_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Copies of what a fusion has in a model, by their names in the state dict."""
    part = f"adapter_fusion_layer.{name}."
    return {key: value.clone() for key, value in model.state_dict().items() if part in key}
