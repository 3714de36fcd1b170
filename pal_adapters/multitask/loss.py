"""One loss for a batch whose rows belong to several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, require_one_of


def multi_task_loss(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], *, task_mean: Literal["macro", "micro"] = "macro"
) -> Tensor:
    """The mean over the tasks present of each task's mean loss (`"macro"`), or the mean over all rows (`"micro"`).

    Cross-entropy for tasks with several outputs, squared error for those with one. With `"macro"` each task counts
    the same whatever its share of the batch.

    Args:
        logits: `[n_t, C_t]` of the rows of each task; tasks without rows are passed over.
        labels: `[n_t]`, class numbers, which may come as floats, or the values of a regression, which must be floats:
            a batch that was typed by its first, classified row would have lost them.
        task_mean: which mean.

    Raises:
        ConfigError: for labels that do not fit, or without any row.

    Example:
        >>> logits = {"rte": torch.zeros(3, 2), "stsb": torch.zeros(1, 1)}
        >>> labels = {"rte": torch.tensor([0, 1, 1]), "stsb": torch.tensor([3.0])}
        >>> round(float(multi_task_loss(logits, labels)), 4)
        4.8466
    """
    require_one_of("task_mean", task_mean, ("macro", "micro"))
    losses, rows = [], []
    for task, values in logits.items():
        if task not in labels or labels[task].shape != values.shape[:1]:
            shape = list(labels[task].shape) if task in labels else None
            raise ConfigError(f"labels of {task!r} have shape {shape}: [{len(values)}] is needed, one for each row.")
        if not len(values):
            continue
        own = labels[task]
        if values.shape[-1] == 1:
            if not own.is_floating_point():
                raise ConfigError(f"labels of {task!r} have type {own.dtype}: the values of a regression are floats.")
            losses.append(F.mse_loss(values[:, 0].float(), own.float()))
        else:
            losses.append(F.cross_entropy(values.float(), own.long()))
        rows.append(len(values))
    if not losses:
        raise ConfigError("logits hold no row of any task.")
    stacked = torch.stack(losses)
    if task_mean == "macro":
        return stacked.mean()
    weights = torch.tensor(rows, dtype=stacked.dtype, device=stacked.device)
    return (stacked * weights).sum() / weights.sum()
