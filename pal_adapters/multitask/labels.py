"""Labels of the rows of a task: whether there are any, and whether they fit the task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets

from .tasks import TaskDataError

if TYPE_CHECKING:
    from .task import Task


def has_labels(task: Task, rows: datasets.Dataset) -> bool:
    """Whether rows have labels. Those of a test set may have no column of labels, or -1 or nothing in each row."""
    if task.kind == "language_modeling":
        return True
    if task.label_column is None or task.label_column not in rows.column_names:
        return False
    return not all(_absent(label) for label in rows[task.label_column][:])


def _absent(label: Any) -> bool:
    if isinstance(label, (list, tuple)):
        return len(label) > 0 and all(_absent(value) for value in label)
    return label is None or (not isinstance(label, bool) and isinstance(label, (int, float)) and label == -1)


def check_labels(task: Task, labels: Sequence[Any], where: str) -> None:
    """Raises `TaskDataError` for the first label that the task does not have."""
    for number, label in enumerate(labels, start=1):
        problem = _problem(task, label)
        if problem:
            raise TaskDataError(f"task {task.name!r}, {where}, row {number}: label {label!r:.60} {problem}")


def _problem(task: Task, label: Any) -> str:
    classes = task.num_choices if task.kind == "multiple_choice" else task.num_labels or 0
    if task.kind in ("single_label", "multiple_choice"):
        return _class_problem(label, classes)
    if task.kind == "regression":
        values = [label] if classes == 1 else label
        if not isinstance(values, (list, tuple)) or len(values) != classes:
            return f"is not {classes} numbers"
        low, high = task.label_range or (-math.inf, math.inf)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                return "is not a finite number"
            if not low <= value <= high:
                return f"is out of range: allowed are {low} to {high}"
    if task.kind == "multi_label":
        if not isinstance(label, (list, tuple)):
            return "is not a list of class numbers"
        return next(filter(None, (_class_problem(value, max(classes, 2)) for value in label)), "")
    if task.kind == "token_tagging":
        if not isinstance(label, (list, tuple)):
            return "is not a list with a class number for each word"
        return next(filter(None, (_class_problem(value, classes) for value in label if value != -100)), "")
    if task.kind == "span_qa":
        if not isinstance(label, Mapping) or not {"text", "answer_start"} <= set(label):
            return "is not a dict with 'text' and 'answer_start'"
        if len(label["text"]) != len(label["answer_start"]):
            return "has another number of texts than of starts"
    return ""


def _class_problem(label: Any, classes: int) -> str:
    if isinstance(label, bool) or not isinstance(label, int):
        return f"is of type {type(label).__name__}, not an integer from 0 to {classes - 1}"
    return "" if 0 <= label < classes else f"is out of range: allowed are 0 to {classes - 1}"
