"""`task_ids`: which task each row of a batch belongs to. Knows no method and neither host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.nn.unit import BatchTasks, batch_tasks

ARGUMENT = "task_ids"
# The same on the way through `PeftModelFor*.forward`, which drops `task_ids`.
CARRIED = "pal_adapters_task_ids"


def _number(task: Any, tasks: Sequence[str]) -> int:
    if isinstance(task, str) and task in tasks:
        return tasks.index(task)
    whole = not isinstance(task, (str, bool, float)) and hasattr(task, "__index__")
    if whole and 0 <= int(task) < len(tasks):
        return int(task)
    raise UnknownAdapterError(
        f"task_ids has {task!r}, which is no task of this adapter: use one of {', '.join(map(repr, tasks))} or a "
        f"number from 0 to {len(tasks) - 1}."
    )


def task_numbers(ids: Any, tasks: Sequence[str], batch: int, *, repeated: bool = False) -> Tensor:
    """`[b]`, the number of the task of each row.

    Args:
        ids: an integer tensor `[b]` or a list of names or numbers; None where there is one task.
        tasks: the names of all tasks.
        batch: `b`.
        repeated: whether generation may repeat each row (beams, several returned sequences).

    Raises:
        UnknownAdapterError: for a task that the adapter does not have.
        UnsupportedError: without `task_ids`, or for another number of them than rows.
    """
    if ids is None:
        if len(tasks) > 1:
            raise UnsupportedError(
                f"task_ids is None, but the active adapter has the tasks {', '.join(map(repr, tasks))}: pass task_ids "
                "to the model, one name or number a row."
            )
        return torch.zeros(batch, dtype=torch.long)
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() != 1:
            raise UnsupportedError(
                f"task_ids of type {ids.dtype} and shape {list(ids.shape)} is not allowed: pass integers of shape "
                "[batch]."
            )
        if torch.compiler.is_compiling():
            numbers = ids.long()
        else:  # this waits for the device, once a forward pass
            numbers = torch.tensor([_number(task, tasks) for task in ids.tolist()], dtype=torch.long)
    elif isinstance(ids, str) or not hasattr(ids, "__iter__"):
        raise UnsupportedError(f"task_ids={ids!r} is not allowed: pass one name or number a row.")
    else:
        numbers = torch.tensor([_number(task, tasks) for task in ids], dtype=torch.long)
    count = numbers.shape[0]
    if count == batch:
        return numbers
    if repeated and count and batch % count == 0:
        return numbers.repeat_interleave(batch // count)
    raise UnsupportedError(f"task_ids has {count} entries, but the batch has {batch} rows: pass one a row.")


class TaskRows:
    """The `task_ids` of the forward pass that a model is in."""

    def __init__(self) -> None:
        self._ids: Any = None
        self._repeated = False
        self._held = False
        self._known: dict[tuple[Any, ...], BatchTasks] = {}

    def _set(self, ids: Any, repeated: bool, held: bool) -> None:
        self._ids, self._repeated, self._held = ids, repeated, held
        self._known = {}

    @contextmanager
    def in_force(self, ids: Any, *, repeated: bool = False) -> Iterator[None]:
        """Within it, the rows belong to these tasks, whatever the model is called with."""
        before = (self._ids, self._repeated, self._held)
        self._set(ids, repeated, True)
        try:
            yield
        finally:
            self._set(*before)

    def allow_repeated(self) -> None:
        """Generation is about to repeat rows (beams, several returned sequences)."""
        self._repeated = True

    def take(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments of a model's forward without `task_ids`, which are noted."""
        ids = [kwargs[name] for name in (ARGUMENT, CARRIED) if kwargs.get(name) is not None]
        if ids or not self._held:
            # They stay until the next call, since activation checkpointing runs blocks again in the backward pass.
            self._set(ids[0] if ids else None, self._repeated and self._held, self._held)
        return args, {name: value for name, value in kwargs.items() if name not in (ARGUMENT, CARRIED)}

    def of(self, tasks: Sequence[str], batch: int, device: torch.device) -> BatchTasks:
        """The task of each row, on a device; see `task_numbers`."""
        if torch.compiler.is_compiling():
            return batch_tasks(task_numbers(self._ids, tasks, batch, repeated=self._repeated)).to(device)
        key = (tuple(tasks), batch, device)
        if key not in self._known:
            numbers = task_numbers(self._ids, tasks, batch, repeated=self._repeated)
            self._known[key] = batch_tasks(numbers).to(device)
        return self._known[key]

    def repeat_in(self, blocks: Sequence[nn.Module]) -> None:
        """Let checkpointed blocks know their rows again when the backward pass runs them once more."""
        for block in blocks:
            function = block.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _Checkpoint):
                block._gradient_checkpointing_func = _Checkpoint(self, function)  # type: ignore[assignment]

    def again(self, given: tuple[Any, bool], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`run` with the tasks of an earlier forward pass."""
        with self.in_force(given[0], repeated=given[1]):
            return run(*args, **kwargs)


class _Checkpoint:
    """A checkpoint function whose second run belongs to the same tasks as the first. A class, so that it is copied."""

    def __init__(self, rows: TaskRows, function: Callable[..., Any]) -> None:
        self.rows = rows
        self.function = function

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = (self.rows._ids, self.rows._repeated)
        return self.function(functools.partial(self.rows.again, given, run), *args, **kwargs)
