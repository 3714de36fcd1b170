"""Evaluation on many tasks: exact losses, and the aggregate of the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import speed_metrics

from pal_adapters.multitask.model.heads import Head
from pal_adapters.multitask.tasks.encoding import EncodedTask

Aggregate = Callable[[Mapping[str, float]], float]
"""Reduces the primary scores of the tasks to one number; scores of metrics where lower is better are negated."""

Outputs = tuple[np.ndarray | None, np.ndarray | None, float | None]
"""Logits, labels and mean loss of all examples; `None` where there are none."""


def example_losses(head: Head, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each example, summed over its items, and the number of items: `[b, 2]`.

    Averaging batch means would weight examples by the batch they happen to be in, and processes repeat examples to
    fill their last batch. From these sums, the mean over all items is exact.
    """
    parts = zip(logits.split(1), labels.split(1), strict=True)
    found = torch.stack([torch.stack(head.loss(*part)) for part in parts])
    return found.masked_fill(found[:, 1:] == 0, 0.0)


@contextmanager
def values_kept(model: nn.Module) -> Iterator[None]:
    """A context after which parameters and buffers that it has cast have their values and dtypes again.

    With `bf16_full_eval` and `fp16_full_eval` the host rounds the model in place, and would go on to train and save it
    like that.
    """
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module._buffers, name, b) for module in model.modules() for name, b in module._buffers.items()]
    try:
        yield
    finally:
        for parameter, value in parameters:
            if parameter.dtype != value.dtype:
                parameter.data = value
        for place, name, buffer in buffers:
            place[name] = buffer


def needs_all(head: Head) -> bool:
    """Whether the loss must be computed over all examples at once: a custom loss may weight them, such as by class.

    The logits of a language model are too large to keep, so its custom loss is averaged over the examples.
    """
    return head.own_loss is not None and head.config.kind != "language_modeling"


def collected(rows: EncodedTask, order: np.ndarray, output: Any, head: Head, device: torch.device) -> Outputs:
    """The outputs of an evaluation loop, in the order of the examples.

    Args:
        rows: The examples.
        order: The order in which they were evaluated.
        output: What the loop returned; its predictions are what `example_outputs` returned for each batch.
        head: The head of the task.
        device: Where to compute a loss over all examples.
    """
    back = np.argsort(order)
    kept = rows.task.kind != "language_modeling"
    logits, losses = output.predictions if rows.has_labels and kept else (output.predictions, output.predictions)
    logits = logits[back] if kept else None
    if not rows.has_labels:
        return logits, None, None
    labels = output.label_ids[back] if kept else None
    if needs_all(head):
        total, count = _loss_of_all(rows, logits, labels, head, device)
    else:
        total, count = losses.sum(0, dtype=np.float64)
    return logits, labels, float(total / max(count, 1))


@torch.no_grad()
def _loss_of_all(rows: EncodedTask, logits: Any, labels: Any, head: Head, device: torch.device) -> tuple[float, float]:
    scored = torch.from_numpy(logits).to(device)
    if rows.task.kind == "span_qa":  # mask the padding between batches like the padding within them
        padding = torch.arange(logits.shape[1]) >= torch.from_numpy(rows.lengths())[:, None]
        scored = scored.masked_fill(padding.unsqueeze(-1).to(device), torch.finfo(scored.dtype).min)
    total, count = head.loss(scored, torch.from_numpy(labels).to(device))
    return float(total), float(count)


def example_outputs(head: Head, logits: Tensor, labels: Tensor | None, padding: Tensor | None) -> tuple[Any, Any]:
    """What the evaluation loop collects from a batch, and its labels.

    Without labels these are the logits; with labels the logits and the losses of the examples; for a language model
    only the losses.

    Args:
        head: The head of the task.
        logits: Logits of the batch.
        labels: Its labels, if any.
        padding: Number of padding tokens on the left of each example `[b, 1]`; `None` if padding is on the right.
    """
    logits = logits.detach().float()
    if head.config.kind == "language_modeling":
        assert labels is not None
        return example_losses(head, logits, labels), None
    losses = None
    if labels is not None:
        losses = logits.new_zeros(len(labels), 2) if needs_all(head) else example_losses(head, logits, labels)
    if padding is not None and head.config.reads_tokens:
        # The loop pads batches on the right to join them, so tokens must start at position 0.
        places = (torch.arange(logits.shape[1], device=logits.device) + padding) % logits.shape[1]
        logits = logits.gather(1, places.unsqueeze(-1).expand_as(logits))
        labels = None if labels is None else labels.gather(1, places)
    return (logits if losses is None else (logits, losses)), labels


def aggregated(primary: Mapping[str, float], aggregate: Aggregate | str) -> float:
    """The aggregate of the primary scores by task; `aggregate` is a function or the name of one in numpy."""
    if callable(aggregate):
        return float(aggregate(primary))
    return float(cast("Any", getattr(np, aggregate))(list(primary.values())))


def summarised(
    prefix: str,
    sets: Mapping[str, EncodedTask],
    scored: Mapping[str, tuple[float | None, dict[str, float]]],
    aggregate: Aggregate | str,
) -> dict[str, float]:
    """The losses and scores of all evaluation sets, by names that begin with `prefix`, and their means.

    Args:
        prefix: Prefix of the names.
        sets: The evaluation sets by name.
        scored: The loss and the scores of each.
        aggregate: See `aggregated`.
    """
    metrics: dict[str, float] = {}
    primary: dict[str, float] = {}
    for key, (loss, found) in scored.items():
        metrics[f"{prefix}_{key}_loss"] = cast("float", loss)
        metrics |= {f"{prefix}_{key}_{name}": value for name, value in found.items()}
        primary.setdefault(sets[key].task.name, sets[key].primary(found))  # the first of several splits
    metrics[f"{prefix}_average"] = aggregated(primary, aggregate)
    metrics[f"{prefix}_loss"] = float(np.mean([cast("float", loss) for loss, _ in scored.values()]))
    return metrics


def speed(prefix: str, start: float, batch_size: int, *sets: EncodedTask) -> dict[str, float]:
    """Seconds since `start`, and examples and steps per second."""
    steps = sum(math.ceil(len(rows) / batch_size) for rows in sets)
    return speed_metrics(prefix, start, num_samples=sum(map(len, sets)), num_steps=steps)
