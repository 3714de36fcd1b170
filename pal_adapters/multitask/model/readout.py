"""From the hidden states of a mixed batch to the logits of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pal_adapters.errors import ConfigError, UnknownAdapterError

from .heads import Head, pool
from .language import vocabulary_logits
from .routing import Hidden


def tasks_of_inputs(task_ids: Any, rows: int, tasks: Sequence[str]) -> list[str]:
    """The task of each encoder input.

    Args:
        task_ids: Names or indices, one for each input, or one name for all.
        rows: Number of encoder inputs.
        tasks: The tasks that exist, in order.

    Raises:
        ConfigError: If there are more or fewer task IDs than inputs.
        UnknownAdapterError: If there is no such task.
    """
    if isinstance(task_ids, str):
        task_ids = [task_ids] * rows
    values = task_ids.flatten().tolist() if isinstance(task_ids, Tensor) else list(task_ids)
    if len(values) != rows:
        raise ConfigError(f"task_ids has {len(values)} entries for {rows} examples: pass one for each.")
    names = []
    for value in values:
        if isinstance(value, str):
            require_task(value, tasks)
            names.append(value)
        elif isinstance(value, bool) or not 0 <= value < len(tasks) or value != int(value):
            raise UnknownAdapterError(
                f"task {value!r} is not there: use a name or an index from 0 to {len(tasks) - 1}."
            )
        else:
            names.append(tasks[int(value)])
    return names


def require_task(task: str, tasks: Sequence[str]) -> None:
    """Raises `UnknownAdapterError` unless the task exists."""
    if task not in tasks:
        raise UnknownAdapterError(f"task {task!r} is not there: {', '.join(tasks) or 'there is none'}.")


def task_logits(
    backbone: Any, heads: Mapping[str, Head], names: Sequence[str] | None, states: Hidden, mask: Tensor | None
) -> dict[str, Tensor]:
    """The logits of each task in a batch, for its examples in order.

    Args:
        backbone: The model, whose output layer a language model uses.
        heads: The head of each task in the batch.
        names: The task of each encoder input; `None` for the logits of all inputs with each head.
        states: What the backbone returned, see `run_batch`.
        mask: 1 for tokens, 0 for padding `[r, n]`.
    """
    hidden, pooled = states
    logits: dict[str, Tensor] = {}
    pools: dict[str, Tensor] = {}
    for task, head in heads.items():
        if head.config.reads_tokens:
            source = hidden
        else:
            kind = head.config.pooling
            if kind not in pools:
                pools[kind] = pool(hidden, mask, kind, pooled)
            source = pools[kind]
        if names is not None and len(heads) > 1:
            at = torch.tensor([row for row, name in enumerate(names) if name == task])
            source = source.index_select(0, at.to(source.device, non_blocking=True))
        if not torch.is_autocast_enabled(source.device.type) and head.linear is not None:
            source = source.to(head.linear.weight.dtype)
        found = head(source, partial(vocabulary_logits, backbone) if head.linear is None else None)
        if head.config.kind == "span_qa" and mask is not None:
            # No span may reach into the padding, whose length depends on the other examples of the batch.
            padding = mask == 0
            if names is not None and len(heads) > 1:
                padding = padding.index_select(0, at.to(padding.device, non_blocking=True))
            found = found.masked_fill(padding.unsqueeze(-1), torch.finfo(found.dtype).min)
        logits[task] = found
    return logits
