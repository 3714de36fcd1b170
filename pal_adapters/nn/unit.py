"""What every task module has in common: plain torch, no host.

A *unit* is the part of one task's module that belongs to one transformer block. It acts at *sites* of the block:

| site           | value it gets and returns                                       |
|----------------|-----------------------------------------------------------------|
| `attention`    | `o1`, the attention output before the residual sum              |
| `ffn`          | `o2`, the feed-forward output before the residual sum           |
| `residual`     | the sum (or a summand of it) that ends the block                |
| `output`       | `y`, the block's output                                         |
| `stack_output` | the output of the whole stack of blocks (after a final norm)    |

At initialisation and with no task selected a unit is not called at all, so the host stays bit-identical.

Legend: b batch rows, n tokens, d model width, r inner width, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pal_adapters.errors import UnsupportedError

from .functional import attend, linear, merge_heads, split_heads
from .inputs import BatchTasks as BatchTasks
from .inputs import UnitInputs as UnitInputs
from .inputs import batch_tasks as batch_tasks
from .inputs import no_mask as no_mask

INIT_STD = 0.02

Weights = Mapping[str, Tensor]


class TaskUnit(nn.Module):
    """Base of the units. Subclasses set `sites` and `needs` and implement `forward`."""

    sites: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    # Whether this is the part of a network that steers the whole model, and acts through hooks of its own.
    is_network: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        # A tuple, so that shared weights are neither registered twice nor saved twice.
        self._shared: tuple[Mapping[str, Tensor] | nn.Module, ...] = ()

    def share(self, weights: Mapping[str, Tensor] | nn.Module) -> None:
        """Read the weights of `weights` too; they stay registered where they are."""
        self._shared = (weights,)

    @property
    def shares(self) -> bool:
        """Whether some weights come from elsewhere."""
        return bool(self._shared)

    def shared_key(self) -> object:
        """Equal for units that share the same weights."""
        return tuple(id(t) for t in self.shared_weights().values())

    def own_weights(self) -> dict[str, Tensor]:
        """The tensors registered here, by name."""
        own: dict[str, Tensor] = {}
        _collect(self, "", own)
        return own

    def shared_weights(self) -> dict[str, Tensor]:
        """The tensors that come from elsewhere, by name."""
        shared: dict[str, Tensor] = {}
        for source in self._shared:
            if isinstance(source, nn.Module):
                _collect(source, "", shared)
            else:
                shared.update(source)
        return shared

    def weights(self) -> dict[str, Tensor]:
        """All tensors that `forward` reads, by name."""
        return {**self.own_weights(), **self.shared_weights()} if self._shared else self.own_weights()

    def signature(self) -> tuple[object, ...]:
        """What has to be equal for units to run as one batch, with one set of weights a row.

        All that `forward` reads from the unit itself: sizes, options, which weights there are. `stack_weights`
        compares the names and shapes of the weights, own and shared, and raises where they differ; options that
        change no weight are the unit's to list.
        """
        return (type(self),)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """Initialise; `identity=True` makes the unit leave the value as it is."""
        raise NotImplementedError

    def mark_frozen(self) -> None:
        """Take `requires_grad` from what does not train although its adapter does."""

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        """The new value at `site`, `[b, n, d]`, in the dtype of `value`."""
        raise NotImplementedError


def _collect(module: nn.Module, prefix: str, into: dict[str, Tensor]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            into[prefix + name] = parameter
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, prefix + name + ".", into)


def init_linear(layer: nn.Linear, *, zero: bool = False, generator: torch.Generator | None = None) -> None:
    """`N(0, 0.02^2)` weights (or zero) and zero biases."""
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
    units: Sequence[TaskUnit], index: Tensor | None, kept: dict[object, dict[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """One set of weights a row.

    Args:
        units: the distinct units of a batch, with equal signatures.
        index: `[b]`, the unit of each row; None if `units` has one entry a row already.
        kept: keeps what the units share with other blocks, so that it is gathered once for all of them.

    Returns:
        Each weight as `[b, *shape]`; a single unit's weights stay as they are.

    Raises:
        UnsupportedError: if the weights of the units differ in names or shapes, although their signatures are equal.
    """
    if len(units) == 1:
        return units[0].weights()
    weights = _gather([unit.own_weights() for unit in units], index, units)
    if any(unit.shares for unit in units):
        key = tuple(unit.shared_key() for unit in units)
        shared = None if kept is None else kept.get(key)
        if shared is None:
            shared = _gather([unit.shared_weights() for unit in units], index, units)
            if kept is not None:
                kept[key] = shared
        weights.update(shared)
    return weights


def _gather(
    tables: Sequence[Mapping[str, Tensor]], index: Tensor | None, units: Sequence[TaskUnit]
) -> dict[str, Tensor]:
    gathered, first = {}, tables[0]
    for table in tables[1:]:
        if table.keys() != first.keys() or any(table[name].shape != first[name].shape for name in first):
            raise UnsupportedError(_difference(first, table, units[0]))
    for name in first:
        together = torch.stack([table[name] for table in tables])
        gathered[name] = together if index is None else together.index_select(0, index)
    return gathered


def _difference(first: Mapping[str, Tensor], other: Mapping[str, Tensor], unit: TaskUnit) -> str:
    shapes = [{name: list(weight.shape) for name, weight in table.items()} for table in (first, other)]
    name = next(name for name in (*first, *other) if shapes[0].get(name) != shapes[1].get(name))
    found = " and ".join(str(table[name]) if name in table else "none" for table in shapes)
    return (
        f"two {type(unit).__name__} modules have equal signatures, but their weights {name!r} differ in shape: "
        f"{found}. signature() has to tell them apart."
    )
