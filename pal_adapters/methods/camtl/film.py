"""FiLM, the building block of CA-MTL, and its condition. Plain torch.

Legend: b examples, n tokens, d width, t tasks, c conditions (tasks in the batch).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.nn.unit import BatchTasks, init_linear


class Condition(NamedTuple):
    """The vectors on which a batch is conditioned, and the vector of each example.

    Attributes:
        table: `[c, d]`.
        member: `[b]`, the row of `table` for each example; None if `table` has one row.
    """

    table: Tensor
    member: Tensor | None

    def rows(self, values: Tensor) -> Tensor:
        """`[c, ...]` -> `[b, ...]`, or `[1, ...]`, to be broadcast, for a single condition."""
        return values if self.member is None else values.index_select(0, self.member)


def condition_of(table: Tensor, batch: BatchTasks) -> Condition:
    """The condition of a batch: the vectors of its tasks.

    Args:
        table: `[t, d]`, one vector per task.
        batch: the task of each example.
    """
    if batch.tasks is not None:
        table = table.index_select(0, batch.tasks)
    return Condition(table, None if table.shape[0] == 1 else batch.member)


class FiLM(nn.Module):
    r"""Feature-wise linear modulation by a condition.

    $$\mathrm{FiLM}(z, X) = (1 + \gamma(z)) \odot X + \beta(z), \qquad [\gamma, \beta] = W_f z + b_f$$

    with `W_f` `[2k, d]`, whose first `k` rows give `gamma`; both are broadcast over the tokens.

    Source: Pilault et al., "Conditionally Adaptive Multi-Task Learning", ICLR 2021.

    Args:
        condition_size: `d`.
        size: `k`.
    """

    def __init__(self, condition_size: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.modulation = nn.Linear(condition_size, 2 * size)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """`N(0, 0.02^2)` and zero biases, or with `identity` all zero, so that FiLM changes nothing."""
        init_linear(self.modulation, zero=identity, generator=generator)

    def coefficients(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """`gamma` and `beta` `[c, k]` of conditions `[c, d]`."""
        return modulation(condition, self.modulation.weight, self.modulation.bias)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """`[b, n, k]` -> `[b, n, k]`, in the dtype of `x`."""
        return modulate(x, self.coefficients(condition.table), condition)


def modulation(condition: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`gamma` and `beta` `[c, k]`: the halves of `W_f z + b_f`."""
    if not torch.is_autocast_enabled(condition.device.type):
        condition = condition.to(weight.dtype)
    gamma, beta = F.linear(condition, weight, bias).chunk(2, dim=-1)
    return gamma, beta


def modulate(x: Tensor, coefficients: tuple[Tensor, Tensor], condition: Condition) -> Tensor:
    """`(1 + gamma) x + beta`, with each example's own coefficients of `[c, k]`."""
    gamma, beta = (condition.rows(values).unsqueeze(1) for values in coefficients)
    return torch.addcmul(beta, x.to(beta.dtype), 1 + gamma).to(x.dtype)
