"""Labels of a task's examples: whether there are any, and whether they fit the task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from .rows import class_names, columns_of, plain_rows
from .types import TaskDataError, TaskFields

_CHUNK = 1000
_LARGEST = 3.4028234663852886e38  # float32
NAMED_KINDS = ("single_label", "multi_label", "token_tagging")
"""Kinds whose labels may be given as class names."""


def numbered(task: TaskFields, rows: datasets.Dataset, where: str) -> list[Any]:
    """The labels of a split, with class names replaced by class numbers.

    A column of `datasets.ClassLabel` is matched to the task by name, since a split may lack a class. If it shares no
    name with the task, its names are assumed to be other names for the same classes. A task without `label_names`
    uses the class names of its training split.

    Raises:
        TaskDataError: For a name that the task does not have, and for a column that shares no name with the task and
            has a different number of classes.
    """
    labels: list[Any] = rows[task.label_column][:]
    names = task.label_names or class_names(task.dataset.get(task.train_split), task.label_column)
    if task.kind not in NAMED_KINDS or not names:
        return labels
    numbers = {name: number for number, name in enumerate(names)}
    there = class_names(rows, task.label_column)
    known = not set(there).isdisjoint(numbers)
    moved = known and there != names[: len(there)]
    if there and not known and len(there) != len(names) and task.kind != "multi_label":
        raise TaskDataError(
            f"{where}: column {task.label_column!r} has the classes {', '.join(map(repr, there)):.100}, none of which "
            f"is one of label_names: {', '.join(map(repr, numbers)):.100}"
        )

    def number_of(label: Any, row: int) -> Any:
        if isinstance(label, list):
            return [number_of(value, row) for value in label]
        if moved and isinstance(label, int) and 0 <= label < len(there):
            label = there[label]
        if isinstance(label, str) and label not in numbers:
            raise TaskDataError(
                f"{where}, row {row}: label {label!r:.60} is not one of label_names: "
                f"{', '.join(map(repr, numbers)):.200}"
            )
        return numbers[label] if isinstance(label, str) else label

    return [number_of(label, row) for row, label in enumerate(labels, start=1)]


def has_labels(task: TaskFields, rows: datasets.Dataset) -> bool:
    """Whether the examples have labels. A test set may have no label column, or only -1 or nothing in it."""
    if task.kind == "language_modeling":
        return True
    if task.label_column is None or task.label_column not in columns_of(rows):
        return False
    return not all(_absent(label) for label in rows[task.label_column][:])


def _absent(label: Any) -> bool:
    if isinstance(label, (list, tuple)):
        return len(label) > 0 and all(_absent(value) for value in label)
    return label in (None, "", "-1") or (not isinstance(label, bool) and label == -1)


def has_unanswerable(task: TaskFields) -> bool:
    """Whether any training question of a task is unanswerable; also true without training examples to tell from."""
    rows = task.dataset.get(task.train_split)
    if rows is None or task.label_column not in columns_of(rows):
        return True
    return not all(answer is None or any(answer["text"][:1]) for answer in plain_rows(rows)[task.label_column][:])


def has_flags(task: TaskFields, rows: datasets.Dataset | None = None) -> bool | None:
    """Whether label sets are given as a 0 or 1 for each class rather than as a list of class numbers.

    They are if every label can be read that way, in all splits of the task or, if given, in `rows`. `None` if there
    is no label to tell from.
    """
    found = None
    for split in map(plain_rows, task.dataset.values()) if rows is None else (rows,):
        if not has_labels(task, split):
            continue
        if task.label_names and len(class_names(split, task.label_column)) == task.num_labels:
            return False
        for start in range(0, len(split), _CHUNK):
            for label in split[start : start + _CHUNK][task.label_column]:
                found = _is_flags(label, task.num_labels or 0)
                if not found:
                    return False
    return found


def _is_flags(label: Any, classes: int) -> bool:
    return isinstance(label, (list, tuple)) and len(label) == classes and all(value in (0, 1) for value in label)


def check_labels(
    task: TaskFields, rows: datasets.Dataset, labels: Sequence[Any], where: str, *, flags: bool = False
) -> None:
    """Raise `TaskDataError` for the first label that does not fit the task.

    Args:
        task: The task.
        rows: Its examples.
        labels: Their labels, as `numbered` returns them.
        where: What error messages call the examples.
        flags: For label sets, see `has_flags`.
    """
    written = rows[task.label_column][:]
    contexts: Sequence[Any] = rows[task.text_columns[1]][:] if task.kind == "span_qa" else ()
    for number, label in enumerate(labels):
        problem = _problem(task, label, flags) or (_answer_problem(label, contexts[number]) if contexts else "")
        if problem:
            raise TaskDataError(f"{where}, row {number + 1}: label {written[number]!r:.60} {problem}")


def _problem(task: TaskFields, label: Any, flags: bool) -> str:
    classes = task.num_choices if task.kind == "multiple_choice" else task.num_labels or 0
    if isinstance(label, str) and task.kind in NAMED_KINDS:
        return f"is of type str, not an integer from 0 to {classes - 1}: name the classes in label_names to use names"
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
            if abs(value) > _LARGEST:
                return f"is out of the range of float32: allowed are {-_LARGEST:.4g} to {_LARGEST:.4g}"
            if not low <= value <= high:
                return f"is out of range: allowed are {low} to {high}"
    if task.kind == "multi_label":
        if not isinstance(label, (list, tuple)):
            return "is not a list of class numbers"
        if flags:
            good = _is_flags(label, classes)
            return (
                "" if good else f"is not a 0 or 1 for each of {classes} classes, as the other labels of the task are"
            )
        problem = next(filter(None, (_class_problem(value, classes) for value in label)), "")
        if not problem and len(set(label)) < len(label):
            problem = "names a class twice"
        as_numbers = (
            f"; not every label of the task is a 0 or 1 for each of {classes} classes, so labels are class numbers"
        )
        return problem and problem + as_numbers
    if task.kind == "token_tagging":
        if not isinstance(label, (list, tuple)):
            return "is not a list with a class number for each word"
        return next(filter(None, (_class_problem(value, classes) for value in label if value != -100)), "")
    if task.kind == "span_qa":
        if not isinstance(label, Mapping) or not {"text", "answer_start"} <= set(label):
            return "is not a dict with 'text' and 'answer_start'"
        if not all(isinstance(label[name], (list, tuple)) for name in ("text", "answer_start")):
            return "is not a dict with a list of texts and a list of starts"
        if len(label["text"]) != len(label["answer_start"]):
            return "has different numbers of texts and starts"
    return ""


def _answer_problem(label: Any, context: Any) -> str:
    for text, start in zip(label["text"], label["answer_start"], strict=True):
        if not isinstance(text, str):
            return f"has the text {text!r:.40}, which is of type {type(text).__name__}"
        if isinstance(start, bool) or not isinstance(start, int):
            return f"has the start {start!r:.40}, which is of type {type(start).__name__}, not an integer"
        if not text or not isinstance(context, str):  # no answer; the columns are checked elsewhere
            continue
        if not 0 <= start <= len(context) - len(text):
            return f"lies outside the context, which has {len(context)} characters"
        if context[start : start + len(text)] != text:
            there = context[start : start + len(text)]
            return f"is not in the context at {start}, which reads {there!r:.40} there"
    return ""


def _class_problem(label: Any, classes: int) -> str:
    if isinstance(label, bool) or not isinstance(label, int):
        return f"is of type {type(label).__name__}, not an integer from 0 to {classes - 1}"
    return "" if 0 <= label < classes else f"is out of range: allowed are 0 to {classes - 1}"
