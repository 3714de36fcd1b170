"""A snapshot of the tasks of a `Predictor`. Running calls keep theirs when tasks are added or removed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from pal_adapters.multitask.model.heads import HeadConfig
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.multitask.tasks.collate import MultiTaskCollator
from pal_adapters.multitask.tasks.task import Task


@dataclass(frozen=True)
class ServedTask:
    """A task of a `Predictor`.

    Args:
        description: What its users see.
        task: How its examples become text.
        head: The configuration of its head.
        group: Equal for tasks whose examples may share a batch.
    """

    description: TaskDescription
    task: Task
    head: HeadConfig
    group: Hashable


class ServedTasks:
    """All tasks of a `Predictor`, with the collator of their batches. It does not change.

    Args:
        tasks: The tasks by name.
        tokenizer: Defines the padding.
    """

    def __init__(self, tasks: Mapping[str, ServedTask], tokenizer: Any) -> None:
        self.tasks = dict(tasks)
        self.descriptions = {name: served.description for name, served in self.tasks.items()}
        self.collator = MultiTaskCollator(tokenizer, {name: served.head for name, served in self.tasks.items()})

    def __getitem__(self, name: str) -> ServedTask:
        return self.tasks[name]
