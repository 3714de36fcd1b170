"""Checks that the arguments of a `Task` have the right types and take effect for its kind."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pal_adapters.errors import ConfigError

from .types import TaskFields

_COLUMNS = ("text_columns", "group_columns", "split_columns", "validation_splits")
_FUNCTIONS = ("loss", "render", "expand")
_TEXTS = {"token_tagging": 1, "language_modeling": 1}
"""Number of text columns that a kind reads; others read a text or a pair, and `multiple_choice` any number."""


def as_tuple(argument: str, value: Any) -> tuple[Any, ...]:
    """The items of a list.

    Raises:
        ConfigError: If it is not a list.
    """
    if not isinstance(value, Iterable):
        raise ConfigError(f"{argument}={value!r:.80} is not allowed: use a list.")
    return tuple(value)


def check_arguments(task: TaskFields) -> None:
    """Raise `ConfigError` for the first argument with a wrong type, or with no effect for the kind of the task."""
    for name in _COLUMNS:
        value = getattr(task, name)
        if not all(isinstance(one, str) for one in value):
            raise _rejected(task, name, "use strings")
        if len(set(value)) < len(value) and name == "validation_splits":
            raise _rejected(task, name, "name each split once")
    for name in _FUNCTIONS:
        if getattr(task, name) is not None and not callable(getattr(task, name)):
            raise _rejected(task, name, "use a function or None")
    for name in ("train_split", "benchmark"):
        if not isinstance(getattr(task, name), str):
            raise _rejected(task, name, "use a string")
    if not isinstance(task.label_column, (str, type(None))):
        raise _rejected(task, "label_column", "use a string or None")
    _check_kind(task)
    if task.label_range is not None and not _is_range(task.label_range):
        raise _rejected(task, "label_range", "use the smallest and the largest label")


def _check_kind(task: TaskFields) -> None:
    without_effect = [
        ("label_range", task.label_range is not None and task.kind != "regression"),
        ("render", task.render is not None and task.kind in ("token_tagging", "span_qa")),
        ("label_names", bool(task.label_names) and task.kind in ("span_qa", "language_modeling")),
    ]
    for name, given in without_effect:
        if given:
            raise ConfigError(f"task {task.name!r}: {name} has no effect for kind={task.kind!r}: leave it out.")
    if task.kind == "span_qa" and len(task.text_columns) != 2:
        raise _rejected(task, "text_columns", "name the columns of the question and of the context")
    count = _TEXTS.get(task.kind, 2)
    if task.kind != "multiple_choice" and task.render is None and len(task.text_columns) > count:
        what = "one column" if count == 1 else "one column, or two for a pair, or join the texts in render"
        raise _rejected(task, "text_columns", f"name {what}")


def _is_range(value: Any) -> bool:
    numbers = isinstance(value, (tuple, list)) and len(value) == 2
    if not numbers or any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in value):
        return False
    return not any(map(math.isnan, value)) and value[0] < value[1]


def _rejected(task: TaskFields, name: str, fix: str) -> ConfigError:
    return ConfigError(f"task {task.name!r}: {name}={getattr(task, name)!r:.80} is not allowed: {fix}.")
