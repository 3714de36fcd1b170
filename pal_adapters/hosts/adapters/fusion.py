"""Fusions in `adapters` that weight their sources by coefficients independent of the input.

The layer of such a fusion is kept where the host keeps its own, in `adapter_fusion_layer.<name>` of a
`BottleneckLayer`, so the host saves, loads, renames, moves, trains and deletes it. The sources' sum is computed here:
as one wide bottleneck if the sources are alike, otherwise one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
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

# The config class of each fusion by its architecture, filled by `patches.register_fusion`.
FUSIONS: dict[str, type[CombinationConfig]] = {}

# The presets by name. The host's own table must not have them: it builds fusions of its own kind from what is there.
PRESETS: dict[str, CombinationConfig] = {}

# Options that only the host's own fusion uses. The host reads them, so this package's configs have them too.
HOST_ONLY = tuple(name for name in AdapterFusionConfig.__dataclass_fields__ if name != "regularization")


@dataclass(eq=False)
class CombinationConfig(AdapterFusionConfig):
    """Base of this package's fusion configs, which a file identifies by their `architecture`.

    Files do not contain the options in `HOST_ONLY`. Where this package is not imported, the host then raises instead
    of building a fusion of its own kind, which would compute something else.
    """

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in HOST_ONLY}

    def build(self, names: Sequence[str], width: int) -> Combination:
        """The layer for these sources at one place of width `d`."""
        raise NotImplementedError


class Combination(nn.Module):
    """Base of the layers. `forward()` returns the coefficients of a call, `[S, d]` or `[S, 1]`, ordered as `names`."""

    names: tuple[str, ...]
    shared: bool
    penalised: bool = False
    # What the mean absolute coefficient is before training; None if it is not trained.
    start: float | None = None
    _wide: WideSources | None = None

    def share(self, owner: Combination) -> None:
        """Use the coefficients of another place from now on; only that place registers them."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """The penalty of this place in training, or None."""
        return None

    def rows(self, setup: Fuse) -> list[tuple[int, Any]]:
        """The children of a `Fuse`, each with its row of `omega`."""
        children = [child if isinstance(child, str) else child.last() for child in setup]
        if sorted(children) != sorted(self.names):
            raise UnsupportedError(
                f"Fuse({', '.join(children)}) cannot be used with the fusion {setup.name!r}, which has coefficients "
                f"for {', '.join(self.names)}: use the same sources."
            )
        return [(self.names.index(name), child) for name, child in zip(children, setup, strict=True)]

    def wide(self, adapters: Sequence[Adapter]) -> WideSources | None:
        """These sources as one wide bottleneck, or None if they differ."""
        known = self._wide
        if known is None or len(known.adapters) != len(adapters) or any(map(_differ, known.adapters, adapters)):
            known = self._wide = WideSources(tuple(adapters))
        return known if known.usable() else None


def _differ(a: object, b: object) -> bool:
    return a is not b


# The forward pass


def compose(layer: BottleneckLayer, setup: Fuse, state: BottleneckState, lvl: int) -> BottleneckState:
    """The residual of a single bottleneck plus the sum of the sources' terms, each times its coefficients."""
    combination: Combination = layer.adapter_fusion_layer[setup.name]
    present = [(row, child) for row, child in combination.rows(setup) if _names(child) & layer.adapters.keys()]
    if len(present) < len(combination.names):
        check_present(layer.adapters_config, setup)
    if not present:  # left out in this block
        return state
    last = _last(present[-1][1], layer)
    parallel = isinstance(layer.adapters[last], ParallelAdapter)
    if state.last is not None and isinstance(layer.adapters[state.last], ParallelAdapter) is not parallel:
        raise UnsupportedError(
            f"Stack({state.last}, {setup}) cannot be used: adapters closes a block differently after sequential and "
            "after parallel bottlenecks. Stack sources of one kind."
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
    """Raise `UnknownAdapterError` for a source that was deleted, rather than left out in a block."""
    gone = sorted(name for child in setup for name in _names(child) if name not in known)
    if gone:
        raise UnknownAdapterError(
            f"{setup} needs {gone[0]!r}, which is no longer on the model: load it again, or delete the fusion "
            f"{setup.name!r} and add one over the remaining sources."
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
    """The sum of terms `[b, n, d]`, each weighted by its row of coefficients."""
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
    """The config, or preset, as a fusion config of this package, or None.

    From a file, it is a dict or the host's own class.
    """
    if isinstance(config, CombinationConfig):
        return config
    if isinstance(config, str):
        return copy(PRESETS[config]) if config in PRESETS else None
    if not isinstance(config, Mapping):
        return None
    ours = FUSIONS.get(config.get("architecture") or "")
    return None if ours is None else ours.from_dict(dict(config))


def add_layer(layer: BottleneckLayer, name: str, config: CombinationConfig, names: Sequence[str]) -> None:
    """Add a fusion's layer to a bottleneck layer, if the sources act there."""
    if not layer.adapters_config.common_config_value(names, layer.location_key):
        return
    combination = config.build(names, layer.model_config.hidden_size).train(layer.training)
    here = next(iter(layer.adapters[n] for n in names if n in layer.adapters), None)
    if here is not None:
        combination.to(next(here.parameters()).device)
    layer.adapter_fusion_layer[name] = combination


def fusion_name(model: Any, fusion: Any) -> str:
    """The name of a fusion on a model.

    Args:
        model: the model.
        fusion: the `Fuse` block, or its name.

    Raises:
        ConfigError: for anything else, such as a list of sources.
        UnknownAdapterError: for a fusion that is not on the model.
    """
    name = fusion.name if isinstance(fusion, Fuse) else fusion
    known = model.adapters_config.fusions
    listed = ", ".join(map(repr, known)) or "(none)"
    if isinstance(name, str) and name in known:
        return name
    if isinstance(name, str):
        raise UnknownAdapterError(f"the model has no fusion {name!r}: pass the Fuse(...) of one of {listed}.")
    raise ConfigError(f"fusion={fusion!r} is not allowed: pass Fuse('a', 'b'), or the name of one of {listed}.")


def places(model: nn.Module, name: str) -> Iterator[tuple[int, BottleneckLayer]]:
    """The bottleneck layers that hold a layer of a fusion, with the index of their block."""
    for index, block in model.iter_layers():  # type: ignore[operator]
        for module in block.modules():
            if isinstance(module, BottleneckLayer) and name in module.adapter_fusion_layer:
                yield index, module


def place_names(layers: Sequence[tuple[int, BottleneckLayer]]) -> list[str]:
    """Names for `places`: `0.output_adapter`, ..., or `encoder.0.output_adapter`, ... if a decoder restarts at 0."""
    keys = [f"{index}.{layer.location_key}" for index, layer in layers]
    if len(set(keys)) == len(keys):
        return keys
    parts = ["encoder" if key not in keys[:i] else "decoder" for i, key in enumerate(keys)]
    return [f"{part}.{key}" for part, key in zip(parts, keys, strict=True)]


def link(model: nn.Module) -> None:
    """If the coefficients of a fusion are shared, make all its places use those of the first."""
    for name in model.adapters_config.fusions:  # type: ignore[union-attr]
        ours = [layer.adapter_fusion_layer[name] for _, layer in places(model, name)]
        ours = [layer for layer in dict.fromkeys(ours) if isinstance(layer, Combination) and layer.shared]
        for other in ours[1:]:
            other.share(ours[0])
