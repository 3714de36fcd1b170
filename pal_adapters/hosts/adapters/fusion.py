"""Fusions in `adapters` that weigh their sources with coefficients which do not depend on the input.

The layer of such a fusion lives where the host's own does, `adapter_fusion_layer.<name>` of a `BottleneckLayer`, so
that the host saves, loads, renames, moves, trains and deletes it. What its sources add is computed here: as one wide
bottleneck where the sources are alike, one after the other where they are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from adapters.composition import Fuse
from adapters.configuration import AdapterFusionConfig
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from adapters.methods.modeling import Adapter, ParallelAdapter
from torch import Tensor, nn

from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError

from .sources import WideSources, added

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


# The forward pass


def compose(layer: BottleneckLayer, setup: Fuse, state: BottleneckState, lvl: int) -> BottleneckState:
    """The sum of the sources' terms, times their coefficients, on the residual of a single bottleneck."""
    combination: Combination = layer.adapter_fusion_layer[setup.name]
    present = [(row, child) for row, child in combination.rows(setup) if _names(child) & layer.adapters.keys()]
    if len(present) < len(combination.names):
        check_present(layer.adapters_config, setup)
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


def check_present(known: Any, setup: Fuse) -> None:
    """Raise `UnknownAdapterError` for a source that was deleted, and not just left out in a block."""
    gone = sorted(name for child in setup for name in _names(child) if name not in known)
    if gone:
        raise UnknownAdapterError(
            f"{setup} needs {gone[0]!r}, which is not on the model any more: load it again, or delete the fusion "
            f"{setup.name!r} and add one over the sources that are left."
        )


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
