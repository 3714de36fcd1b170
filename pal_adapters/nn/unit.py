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

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .functional import attend, linear, merge_heads, split_heads

INIT_STD = 0.02

Weights = Mapping[str, Tensor]


class KeyValueCache(Protocol):
    """Keeps keys and values of earlier tokens during generation."""

    def update(
        self, slot: object, keys: Tensor, values: Tensor, *, rows: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor]: ...


class MaskFunction(Protocol):
    """Gives `(mask, is_causal)` for a call with `q_len` queries and `kv_len` keys, see `functional.attend`."""

    def __call__(self, q_len: int, kv_len: int, /) -> tuple[Tensor | None, bool]: ...


def no_mask(q_len: int, kv_len: int) -> tuple[Tensor | None, bool]:
    """Every token sees every token."""
    return None, False


class BatchTasks(NamedTuple):
    """The tasks that the rows of a batch belong to, for modules that serve many tasks.

    Attributes:
        tasks: `[c]`, the tasks that are in the batch, each once; None for all that there are.
        member: `[b]`, the position in `tasks` of each row's task.
    """

    tasks: Tensor | None
    member: Tensor

    def to(self, device: torch.device) -> BatchTasks:
        return BatchTasks(None if self.tasks is None else self.tasks.to(device), self.member.to(device))


def batch_tasks(numbers: Tensor) -> BatchTasks:
    """Of `[b]`, the number of the task of each row.

    What a module makes of a task then neither costs nor rounds differently for the tasks that are absent. A compiled
    graph cannot have a size that depends on values: there, all tasks count as present.
    """
    if torch.compiler.is_compiling():
        return BatchTasks(None, numbers)
    return BatchTasks(*numbers.unique(return_inverse=True))


class UnitInputs(NamedTuple):
    """What a unit may read beside the value that it changes.

    Attributes:
        x: `[b, n, d]` what self-attention reads: the block's input, normalised in pre-LN blocks.
        raw: `[b, n, d]` the block's input as it is.
        h: `[b, n, d]` feed-forward input. All three are None where no unit needs them.
        mask: the host's attention mask for this call.
        cache: keys and values of earlier tokens, or None outside generation.
        rows: batch rows that `x` holds, or None for all of them.
        batch: rows of the whole batch.
        slot: names this unit in `cache`.
    """

    x: Tensor | None = None
    raw: Tensor | None = None
    h: Tensor | None = None
    mask: MaskFunction = no_mask
    cache: KeyValueCache | None = None
    rows: Tensor | None = None
    batch: int = 0
    slot: tuple[object, ...] = ()

    def read(self, name: str) -> Tensor:
        """`x`, `raw` or `h`."""
        tensor = getattr(self, name)
        assert tensor is not None, f"{name} was not captured"
        return tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> UnitInputs:
        """`function` applied to `x`, `raw` and `h`."""
        x, raw, h = (None if t is None else function(t) for t in (self.x, self.raw, self.h))
        return self._replace(x=x, raw=raw, h=h)


class TaskUnit(nn.Module):
    """Base of the units. Subclasses set `sites` and `needs` and implement `forward`."""

    sites: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

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
        """Units with equal signatures can run as one batch, with one set of weights a row."""
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
    """
    if len(units) == 1:
        return units[0].weights()
    weights = _gather([unit.own_weights() for unit in units], index)
    if units[0].shares:
        key = tuple(unit.shared_key() for unit in units)
        shared = None if kept is None else kept.get(key)
        if shared is None:
            shared = _gather([unit.shared_weights() for unit in units], index)
            if kept is not None:
                kept[key] = shared
        weights.update(shared)
    return weights


def _gather(tables: Sequence[Mapping[str, Tensor]], index: Tensor | None) -> dict[str, Tensor]:
    gathered = {}
    for name in tables[0]:
        together = torch.stack([table[name] for table in tables])
        gathered[name] = together if index is None else together.index_select(0, index)
    return gathered
