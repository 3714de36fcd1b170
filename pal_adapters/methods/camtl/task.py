"""Task embeddings, the vectors derived from them, and the alignment after the embeddings. Plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.nn.unit import INIT_STD, BatchTasks, init_linear

from .film import Condition, FiLM, condition_of, modulate, modulation


class TaskConditions(nn.Module):
    r"""What all blocks share: one vector per task, used in two ways.

    $$X_0 = \mathrm{FiLM}(z_t, \mathrm{Emb}), \qquad z'_t = W_z z_t + b_z$$

    The alignment of the token embeddings reads the task embedding `z_t` itself, the modules in the blocks `z'_t`.

    Args:
        size: `d`.
        num_tasks: `t`.
        alignment: whether to align the embeddings.
    """

    def __init__(self, size: int, num_tasks: int, *, alignment: bool = True) -> None:
        super().__init__()
        self.task_embedding = nn.Parameter(torch.empty(num_tasks, size))
        self.transformation = nn.Linear(size, size)
        self.alignment = FiLM(size, size) if alignment else None

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """`N(0, 0.02^2)` and zero biases; with `identity` the alignment changes nothing."""
        with torch.no_grad():
            draw_rows(self.task_embedding, generator)
        init_linear(self.transformation, generator=generator)
        if self.alignment is not None:
            self.alignment.reset_parameters(identity=identity, generator=generator)


def draw_rows(table: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill task embeddings with `N(0, 0.02^2)`."""
    if table.device.type == "meta":
        return
    table.copy_(torch.empty(table.shape).normal_(0.0, INIT_STD, generator=generator))


def transformed(weights: Mapping[str, Tensor], batch: BatchTasks) -> Condition:
    """`z'` of a batch.

    Args:
        weights: the tensors of a `TaskConditions` by name.
        batch: the task of each example.
    """
    table = weights["task_embedding"]
    condition = condition_of(table, batch.to(table.device))
    table = F.linear(condition.table, weights["transformation.weight"], weights["transformation.bias"])
    # The blocks of a model may be on other devices.
    return Condition(table.to(batch.member.device), None if condition.member is None else batch.member)


def align(weights: Mapping[str, Tensor], x: Tensor, batch: BatchTasks) -> Tensor:
    """`FiLM(z, x)` for `x` `[b, n, d]`, or `x` itself without an alignment."""
    if "alignment.modulation.weight" not in weights:
        return x
    condition = condition_of(weights["task_embedding"], batch)
    names = ("alignment.modulation.weight", "alignment.modulation.bias")
    return modulate(x, modulation(condition.table, *(weights[name] for name in names)), condition)
