"""Requests as they are passed to a `Predictor`, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pal_adapters.checks import shown
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.model.task_description import CUSTOM, TaskDescription

OPTIONS: dict[str, tuple[str, ...]] = {
    "token_tagging": ("text",),
    "language_modeling": ("continuation", "max_new_tokens"),
}
"""Keys that a request of a kind may have besides the columns of its task."""
MOST_NEW_TOKENS = 4096


class RequestError(ConfigError):
    """A request that cannot be answered.

    Args:
        reason: Why.
        index: Its number among the requests, from 0.
        task: Name of its task, if it has one.
    """

    def __init__(self, reason: str, index: int = 0, task: str | None = None) -> None:
        named = "" if task is None else f" (task {task!r:.110})"
        super().__init__(f"request {index}{named}: {reason}")
        self.reason = reason
        self.index = index
        self.task = task


@dataclass(frozen=True)
class Request:
    """A checked request.

    Args:
        index: Its number among the requests.
        task: Name of its task.
        row: Its columns and options.
    """

    index: int
    task: str
    row: Mapping[str, Any]

    def error(self, reason: str) -> RequestError:
        """The error that says why this request cannot be answered."""
        return RequestError(reason, self.index, self.task)


def as_requests(given: Any, task: Any) -> list[Any]:
    """The requests in each form that a `Predictor` takes, as one list, without checks of their content.

    Args:
        given: A text, a mapping, or a list of these.
        task: The task of texts and of mappings without one, or several tasks for one text or mapping.
    """
    several = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    if task is None or isinstance(task, str):
        tasks = [task]
    elif isinstance(task, Sequence) and all(isinstance(name, str) for name in task):
        if several:
            raise RequestError("several tasks need a single text: pass a text, or give each request its task.")
        tasks = list(task)
    else:
        raise RequestError(f"task={task!r:.60} is not allowed: use the name of a task, or a list of names.")
    return [_with_task(item, name) for name in tasks for item in (given if several else [given])]


def _with_task(item: Any, task: str | None) -> Any:
    if task is None:
        return item
    if isinstance(item, Mapping):
        return item if "task" in item else {"task": task, **item}
    return {"task": task, "": item}


def check_request(given: Any, index: int, tasks: Mapping[str, TaskDescription]) -> Request:
    """The checked request: everything its task needs and nothing else.

    Raises:
        RequestError: If something is missing, unknown or of the wrong type.
    """
    if not isinstance(given, Mapping):
        raise RequestError(
            f"{shown(given)} is not a request: use a dict with 'task' and the columns of the task, or pass task=.",
            index,
        )
    name = given.get("task")
    if not isinstance(name, str) or name not in tasks:
        there = ", ".join(map(repr, tasks)) or "none"
        asked = "there is no 'task'" if name is None else f"there is no task {name!r:.110}"
        raise RequestError(f"{asked}: use one of {there:.1000}.", index, name if isinstance(name, str) else None)
    task = tasks[name]
    row = {key: value for key, value in given.items() if key != "task"}
    request = Request(index, name, _named(row, task, index))
    _check_columns(request, task)
    if task.kind == "token_tagging":
        _check_words(request, task)
    elif task.kind == "language_modeling":
        _check_continuation(request)
    return request


def _named(row: dict[str, Any], task: TaskDescription, index: int) -> Mapping[str, Any]:
    """A request whose text was passed without a column name, which is unambiguous if the task has only one column."""
    if set(row) != {""}:
        return row
    if task.kind == "token_tagging":
        return {"text" if isinstance(row[""], str) else task.text_columns[0]: row[""]}
    if len(task.text_columns) > 1:
        columns = ", ".join(map(repr, task.text_columns))
        raise RequestError(f"the task reads {columns}: pass a dict with these columns.", index, task.name)
    return {task.text_columns[0]: row[""]}


def _check_columns(request: Request, task: TaskDescription) -> None:
    row, options = request.row, OPTIONS.get(task.kind, ())
    instead = task.kind == "token_tagging" and "text" in row
    if instead and task.text_columns[0] != "text" and task.text_columns[0] in row:
        raise request.error(f"it has {task.text_columns[0]!r} and 'text': pass one of them.")
    for column in () if instead else task.text_columns:
        if column not in row:
            wanted = ", ".join(map(repr, task.text_columns))
            raise request.error(f"there is no column {column!r}: the task needs {wanted}.")
    unknown = [key for key in row if key not in task.text_columns and key not in options]
    if unknown and task.template != CUSTOM:
        allowed = ", ".join(map(repr, dict.fromkeys((*task.text_columns, *options))))
        raise request.error(f"the column {unknown[0]!r:.60} is unknown: allowed are {allowed}.")
    if task.kind == "token_tagging" or task.template == CUSTOM:
        return
    for column in task.text_columns:
        # In built-in templates, the only columns that are not texts are indices of words.
        kind, noun = (
            (int, "an integer") if task.template != "columns" and column.endswith("_index") else (str, "a text")
        )
        if not isinstance(row[column], kind) or isinstance(row[column], bool):
            raise request.error(f"column {column!r} holds {shown(row[column])}, not {noun}.")


def _check_words(request: Request, task: TaskDescription) -> None:
    column = task.text_columns[0] if task.text_columns[0] in request.row else "text"
    value = request.row[column]
    if isinstance(value, str):
        return
    if not isinstance(value, Sequence) or not all(isinstance(word, str) for word in value):
        raise request.error(f"column {column!r} holds {shown(value)}, not a text or a list of words.")


def _check_continuation(request: Request) -> None:
    row = request.row
    if "continuation" in row and "max_new_tokens" in row:
        raise request.error(
            "it has 'continuation' and 'max_new_tokens': a given continuation is scored, not generated."
        )
    if not isinstance(row.get("continuation", ""), str):
        raise request.error(f"'continuation' holds {shown(row['continuation'])}, not a text.")
    new = row.get("max_new_tokens", 1)
    if isinstance(new, bool) or not isinstance(new, int) or not 1 <= new <= MOST_NEW_TOKENS:
        raise request.error(f"'max_new_tokens' is {shown(new)}: use an integer from 1 to {MOST_NEW_TOKENS}.")
