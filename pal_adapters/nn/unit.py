"""The base class of task modules, in plain torch.

A *unit* is the part of one task's module in one Transformer block. It acts at *sites* of the block:

| site           | value it receives and returns                                   |
|----------------|-----------------------------------------------------------------|
| `attention`    | `o1`, the attention output before the residual sum              |
| `ffn`          | `o2`, the feed-forward output before the residual sum           |
| `residual`     | the residual sum at the end of the block, or one of its terms   |
| `output`       | `y`, the block's output                                         |
| `stack_output` | the output of the whole stack of blocks (after a final norm)    |

With no active task, no unit is called and the base model computes exactly what it did before.

Legend: b examples, n tokens, d model width, r inner width, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pal_adapters.errors import UnsupportedError

from .functional import TaskMatrices, attend, linear, merge_heads, split_heads
from .inputs import BatchTasks as BatchTasks
from .inputs import UnitInputs as UnitInputs
from .inputs import batch_tasks as batch_tasks
from .inputs import no_mask as no_mask

INIT_STD = 0.02

Weights = Mapping[str, Tensor]


class TaskUnit(nn.Module):
    """Base of the units. Subclasses set `sites` and `needs` (of `x`, `raw`, `h`, `mask`) and implement `forward`."""

    sites: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    # Whether this is part of a network over the whole model, which has its own hooks (`hooks/network.py`).
    is_network: ClassVar[bool] = False
    # Whether `forward` passes its matrices only to `nn.functional.linear`. The examples of a mixed batch may then be
    # in the order of their tasks, with one matrix for all examples of a task.
    groups_tasks: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        # A tuple, so that shared weights are neither registered twice nor saved twice.
        self._shared: tuple[Mapping[str, Tensor] | nn.Module, ...] = ()

    def share(self, weights: Mapping[str, Tensor] | nn.Module) -> None:
        """Also read these weights, which stay registered where they are."""
        self._shared = (weights,)

    @property
    def shares(self) -> bool:
        """Whether some weights are shared."""
        return bool(self._shared)

    def shared_key(self) -> object:
        """Equal for units that share the same weights."""
        return tuple(id(t) for t in self.shared_weights().values())

    def own_weights(self) -> dict[str, Tensor]:
        """The weights registered here, by name."""
        own: dict[str, Tensor] = {}
        _collect(self, "", own)
        return own

    def shared_weights(self) -> dict[str, Tensor]:
        """The shared weights, by name."""
        shared: dict[str, Tensor] = {}
        for source in self._shared:
            if isinstance(source, nn.Module):
                _collect(source, "", shared)
            else:
                shared.update(source)
        return shared

    def weights(self) -> dict[str, Tensor]:
        """All weights that `forward` reads, by name."""
        return {**self.own_weights(), **self.shared_weights()} if self._shared else self.own_weights()

    def signature(self) -> tuple[object, ...]:
        """What must be equal for units to run in one call, with one set of weights per example.

        Everything that `forward` reads from the unit itself: sizes, options, which weights exist. `stack_weights`
        compares the names and shapes of all weights and raises if they differ, but it cannot see options that do not
        change the weights.
        """
        return (type(self),)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters; with `identity=True`, `forward` returns the value unchanged."""
        raise NotImplementedError

    def mark_frozen(self) -> None:
        """Set `requires_grad=False` on parameters that stay frozen while their adapter trains."""

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        """The new value at `site`, `[b, n, d]`, in the dtype of `value`."""
        raise NotImplementedError


class UnitDict(nn.ModuleDict):
    """The units of one adapter in one block, by method."""


def _collect(module: nn.Module, prefix: str, into: dict[str, Tensor]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            into[prefix + name] = parameter
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, prefix + name + ".", into)


def init_linear(layer: nn.Linear, *, zero: bool = False, generator: torch.Generator | None = None) -> None:
    """Weights from `N(0, 0.02^2)`, or zero, and zero biases."""
    with torch.no_grad():
        if zero:
            layer.weight.zero_()
        elif layer.weight.device.type == "meta":
            layer.weight.normal_(0.0, INIT_STD)
        else:
            draw = torch.empty(layer.weight.shape).normal_(0.0, INIT_STD, generator=generator)
            layer.weight.copy_(draw)
        if layer.bias is not None:
            layer.bias.zero_()


def self_attention(
    x: Tensor, weights: Weights, prefix: str, *, num_heads: int, dropout: float, inputs: UnitInputs, slot: object = ""
) -> Tensor:
    """Multi-head self-attention with biases and without an output projection, `[b, n, r]` -> `[b, n, r]`."""

    def project(name: str) -> Tensor:
        return split_heads(
            linear(x, weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias")), num_heads
        )

    q, k, v = project("query"), project("key"), project("value")
    if inputs.cache is not None:
        k, v = inputs.cache.update((*inputs.slot, slot), k, v, rows=inputs.rows, batch=inputs.batch)
    mask, is_causal = inputs.mask(q.shape[2], k.shape[2])
    return merge_heads(attend(q, k, v, mask, is_causal=is_causal, dropout=dropout))


def stack_weights(
    units: Sequence[TaskUnit],
    index: Tensor | None,
    kept: dict[object, dict[str, Any]] | None = None,
    counts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The weights of a mixed batch: one set per example, or one matrix per task.

    Args:
        units: the distinct units of a batch, with equal signatures.
        index: `[b]`, the unit of each example; None if `units` has one entry per example already.
        kept: keeps what the units share with other blocks, so that it is gathered once for all of them.
        counts: how many examples each unit has, for a batch in the order of the units that all have `groups_tasks`;
            None for any other batch.

    Returns:
        Each weight as `[b, *shape]`; with `counts`, each matrix as `TaskMatrices` instead. A single unit's weights are
        unchanged.

    Raises:
        UnsupportedError: if the weights of the units differ in name or shape although their signatures are equal.
    """
    if len(units) == 1:
        return units[0].weights()
    weights = _gather([unit.own_weights() for unit in units], index, counts, units)
    if any(unit.shares for unit in units):
        key = (tuple(unit.shared_key() for unit in units), counts)
        shared = None if kept is None else kept.get(key)
        if shared is None:
            shared = _gather([unit.shared_weights() for unit in units], index, counts, units)
            if kept is not None:
                kept[key] = shared
        weights.update(shared)
    return weights


def _gather(
    tables: Sequence[Mapping[str, Tensor]],
    index: Tensor | None,
    counts: Sequence[int] | None,
    units: Sequence[TaskUnit],
) -> dict[str, Any]:
    gathered: dict[str, Any] = {}
    first = tables[0]
    for table in tables[1:]:
        if table.keys() != first.keys() or any(table[name].shape != first[name].shape for name in first):
            raise UnsupportedError(_difference(first, table, units[0]))
    for name in first:
        if counts is not None and first[name].dim() == 2:
            gathered[name] = TaskMatrices([table[name] for table in tables], counts)
            continue
        together = torch.stack([table[name] for table in tables])
        gathered[name] = together if index is None else together.index_select(0, index)
    return gathered


def key_of(path: str) -> str:
    """The path of a module or parameter as a key of `nn.ModuleDict` or `nn.ParameterDict`: `__` replaces dots."""
    return path.replace(".", "__")


def _difference(first: Mapping[str, Tensor], other: Mapping[str, Tensor], unit: TaskUnit) -> str:
    shapes = [{name: list(weight.shape) for name, weight in table.items()} for table in (first, other)]
    name = next(name for name in (*first, *other) if shapes[0].get(name) != shapes[1].get(name))
    found = " and ".join(str(table[name]) if name in table else "none" for table in shapes)
    return (
        f"two {type(unit).__name__} modules have equal signatures, but their weights {name!r} differ in shape: "
        f"{found}. Return different signatures for them."
    )
