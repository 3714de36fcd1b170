"""The loss of a batch of many tasks, see `TaskHeads`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pal_adapters.errors import ConfigError

from .heads import Head
from .routes import Route, route_key
from .routing import fusion_penalty


def labels_by_task(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor] | Tensor) -> Mapping[str, Tensor]:
    """The labels of each task in the batch.

    Raises:
        ConfigError: If they are not for the tasks in the batch.
    """
    if isinstance(labels, Tensor):
        if len(logits) > 1:
            raise ConfigError(f"labels is one tensor, but the batch has {len(logits)} tasks: pass a dict by task.")
        labels = dict.fromkeys(logits, labels)
    if set(labels) != set(logits):
        raise ConfigError(f"labels are for {sorted(labels)}, but the examples are of {sorted(logits)}.")
    return labels


def summed_losses(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], heads: Mapping[str, Head]
) -> tuple[Tensor, Tensor]:
    """For each task its summed loss and the number of items in it, `[t]` each.

    Args:
        logits: Logits of each task in the batch.
        labels: Their labels.
        heads: The head of every task.
    """
    zero = torch.zeros((), device=next(iter(logits.values())).device)
    sums, counts = dict.fromkeys(heads, zero), dict.fromkeys(heads, zero)
    for task, rows in logits.items():
        sums[task], counts[task] = heads[task].loss(rows, labels[task].to(rows.device))
    return torch.stack(list(sums.values())), torch.stack(list(counts.values()))


def weighted_loss(losses: Tensor, whole: Tensor, routes: Mapping[str, Route], balance: str) -> Tensor:
    """The weighted mean of the mean losses of the tasks, a scalar.

    Args:
        losses: Summed loss of each task `[t]`.
        whole: Number of items that the mean of each task is over `[t]`; 0 for absent tasks.
        routes: The route of every task.
        balance: See `TaskHeads`.
    """
    weights = torch.tensor([route.weight for route in routes.values()]).to(losses.device, non_blocking=True)
    shares = whole if balance == "row" else (whole > 0).to(losses.dtype)
    # Normalising by the weights as well would cancel the weight of a task that is alone in a step.
    shares = weights * shares / shares.sum().clamp(min=1)
    return (shares * losses / whole.clamp(min=1)).sum()


def batch_penalty(
    backbone: Any, present: Mapping[str, Tensor], routes: Mapping[str, Route], own: Tensor, whole: Tensor
) -> Tensor:
    """Penalties of the fusions in a batch, scaled so that the batches of a step together add each of them once.

    Args:
        backbone: The model.
        present: The tasks in the batch.
        routes: The route of every task.
        own: Number of items of each task in the batch `[t]`.
        whole: Their number in the whole step `[t]`.
    """
    total = own.new_zeros(())
    keys = [route_key(route.adapter) for route in routes.values()]
    for key, adapter in {route_key(a): a for a in (routes[task].adapter for task in present)}.items():
        penalty = fusion_penalty(backbone, adapter)
        if penalty is not None:
            at = torch.tensor([key == other for other in keys]).to(own.device, non_blocking=True)
            total = total + penalty.to(own.device) * (own * at).sum() / (whole * at).sum().clamp(min=1)
    return total
