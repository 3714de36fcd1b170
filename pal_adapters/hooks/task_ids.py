"""`task_ids`: the task of each example of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.nn.tracing import tracing
from pal_adapters.nn.unit import BatchTasks, batch_tasks

from .call import CallValue

ARGUMENT = "task_ids"
# The name under which they pass through `PeftModelFor*.forward`, which drops `task_ids`.
CARRIED = "pal_adapters_task_ids"


def is_number(task: Any) -> bool:
    """Whether a task is given by number, a Python or numpy integer."""
    if isinstance(task, int):  # first: torch.compile does not trace the other test
        return not isinstance(task, bool)
    return isinstance(task, SupportsIndex)


def _number(task: Any, tasks: Sequence[str]) -> int:
    if isinstance(task, str) and task in tasks:
        return tasks.index(task)
    if is_number(task) and 0 <= int(task) < len(tasks):
        return int(task)
    raise UnknownAdapterError(
        f"task_ids has {task!r}, which is no task of this adapter: use one of {', '.join(map(repr, tasks))} or a "
        f"number from 0 to {len(tasks) - 1}."
    )


def task_numbers(ids: Any, tasks: Sequence[str], batch: int, *, repeated: bool = False) -> Tensor:
    """`[b]`, the number of each example's task.

    Args:
        ids: an integer tensor `[b]` or a list of names or numbers; None if there is one task.
        tasks: the names of all tasks.
        batch: `b`.
        repeated: whether generation may repeat each example (beams, several returned sequences).

    Raises:
        UnknownAdapterError: for a task that the adapter does not have.
        UnsupportedError: without `task_ids`, or if there is not one per example.
    """
    if ids is None:
        if len(tasks) > 1:
            raise UnsupportedError(
                f"task_ids is None, but the active adapter has the tasks {', '.join(map(repr, tasks))}: pass task_ids "
                "to the model, one name or number per example."
            )
        return torch.zeros(batch, dtype=torch.long)
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() != 1:
            raise UnsupportedError(
                f"task_ids of type {ids.dtype} and shape {list(ids.shape)} is not allowed: pass integers of shape "
                "[batch]."
            )
        if tracing():
            numbers = ids.long()
        else:  # this waits for the device, once a forward pass
            numbers = torch.tensor([_number(task, tasks) for task in ids.tolist()], dtype=torch.long)
    elif isinstance(ids, str) or not hasattr(ids, "__iter__"):
        raise UnsupportedError(f"task_ids={ids!r} is not allowed: pass one name or number per example.")
    else:
        numbers = torch.tensor([_number(task, tasks) for task in ids], dtype=torch.long)
    count = numbers.shape[0]
    if count == batch:
        return numbers
    if repeated and count and batch % count == 0:
        return numbers.repeat_interleave(batch // count)
    raise UnsupportedError(f"task_ids has {count} entries, but the batch has {batch} examples: pass one per example.")


@dataclass
class _Given:
    """The `task_ids` of one forward pass.

    Attributes:
        ids: as the caller passed them.
        repeated: whether generation may repeat each example.
        held: whether they override the `task_ids` that the model is called with.
        known: the examples' tasks by batch size and device: every block asks, and reading the IDs waits for the
            device.
    """

    ids: Any = None
    repeated: bool = False
    held: bool = False
    known: dict[tuple[Any, ...], BatchTasks] = field(default_factory=dict)


class TaskRows:
    """The `task_ids` of a model's current forward pass, in each thread."""

    def __init__(self) -> None:
        self.call = CallValue()

    @contextmanager
    def in_force(self, ids: Any, *, repeated: bool = False) -> Iterator[None]:
        """Use these tasks inside the `with` block, whatever the model is called with."""
        before = self.call.value
        self.call.value = _Given(ids, repeated, held=True)
        try:
            yield
        finally:  # `take` may have noted others
            self.call.value = before

    def allow_repeated(self) -> None:
        """Note that generation is about to repeat examples (beams, several returned sequences)."""
        given = self.call.value or _Given()
        self.call.value = replace(given, repeated=True, known={})

    def take(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Note `task_ids` and return the other arguments of a model's forward."""
        ids = [kwargs[name] for name in (ARGUMENT, CARRIED) if kwargs.get(name) is not None]
        given = self.call.value or _Given()
        if ids or not given.held:
            self.call.value = _Given(ids[0] if ids else None, given.repeated and given.held, given.held)
        return args, {name: value for name, value in kwargs.items() if name not in (ARGUMENT, CARRIED)}

    def of(self, tasks: Sequence[str], batch: int, device: torch.device) -> BatchTasks:
        """The task of each example, on a device; see `task_numbers`."""
        given = self.call.value or _Given()
        if tracing():
            return batch_tasks(task_numbers(given.ids, tasks, batch, repeated=given.repeated)).to(device)
        key = (tuple(tasks), batch, device)
        if key not in given.known:
            numbers = task_numbers(given.ids, tasks, batch, repeated=given.repeated)
            given.known[key] = batch_tasks(numbers).to(device)
        return given.known[key]
