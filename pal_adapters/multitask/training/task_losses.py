"""The running losses of the tasks between two log entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class TaskLosses:
    """Sums the losses of each task, and the items that they are over, until they are logged.

    Args:
        tasks: Names of the tasks in the order of their task IDs.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self._sums: Tensor | None = None  # [2, t]

    def add(self, losses: Tensor, counts: Tensor) -> None:
        """Adds the sums of the losses and the numbers of items of a batch, `[t]` each."""
        sums = torch.stack([losses, counts])
        self._sums = sums if self._sums is None else self._sums + sums

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean loss of each task since the last call, as `loss_<task>`; `reduce` sums over processes."""
        if self._sums is None:
            return {}
        totals = reduce(self._sums.double())
        self._sums = None
        return {
            f"loss_{task}": loss / count
            for task, loss, count in zip(self.tasks, *totals.tolist(), strict=True)
            if count
        }
