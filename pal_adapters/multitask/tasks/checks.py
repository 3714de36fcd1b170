"""Checks that the examples of a split have the columns and texts that their task reads."""

from __future__ import annotations

import datasets

from .labels import check_labels, has_flags, numbered
from .rows import columns_of
from .types import TaskDataError, TaskFields


def check_columns(task: TaskFields, rows: datasets.Dataset, where: str, *, labels: bool) -> None:
    """Raise `TaskDataError` if a split has no examples, lacks a column, or holds anything but texts.

    Args:
        task: The task.
        rows: Its examples.
        where: What error messages call them.
        labels: Whether they need labels.
    """
    if len(rows) == 0:
        raise TaskDataError(f"{where}: no rows")
    if labels and not task.label_column and task.kind != "language_modeling":
        raise TaskDataError(f"{where}: no labels, as the task has no label_column")
    needed = [*task.text_columns]
    if labels:
        needed += [*([task.label_column] if task.label_column else []), *task.group_columns]
    for column in needed:
        if column not in columns_of(rows):
            raise TaskDataError(f"{where}: no column {column!r}; found: {', '.join(columns_of(rows))}")
    if task.render is not None and not task.benchmark:
        return  # a custom `render` may read anything
    kind, kind_name = (list, "list of words") if task.kind == "token_tagging" else (str, "text")
    for column in task.text_columns:
        if column.endswith("_index") and task.render is not None:
            continue
        for number, value in enumerate(rows[column][:], start=1):
            if not isinstance(value, kind):
                raise TaskDataError(f"{where}, row {number}: column {column!r} holds {value!r:.40}, not a {kind_name}")
            if kind is list and not all(isinstance(word, str) for word in value):
                word = next(word for word in value if not isinstance(word, str))
                raise TaskDataError(
                    f"{where}, row {number}: column {column!r} has the word {word!r:.40}, which is not a text"
                )


def check_split(task: TaskFields, rows: datasets.Dataset, where: str) -> None:
    """Raise `TaskDataError` unless every example of a labelled split fits its task."""
    check_columns(task, rows, where, labels=True)
    check_labels(task, rows, numbered(task, rows, where), where, flags=bool(has_flags(task, rows)))
    for number in range(len(rows) if task.render is not None else 0):
        try:
            task.segments(rows[number])
        except TaskDataError as error:
            raise TaskDataError(f"{where}, row {number + 1}: {error}") from error
