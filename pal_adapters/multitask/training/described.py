"""Describes the tasks of a run for the saved folder, with the scores of the saved weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pal_adapters.multitask.metrics.custom import primary_name
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.multitask.tasks.encoding import ConcatTasks, EncodedTask

_SPEED = ("runtime", "samples_per_second", "steps_per_second")


def described_run(
    training: ConcatTasks, evaluated: Mapping[str, EncodedTask] | None, scored: Mapping[str, Any] | None
) -> list[TaskDescription]:
    """The description of each task.

    Args:
        training: The training examples of all tasks.
        evaluated: The evaluation sets by name.
        scored: What `evaluate` returned for the current weights, if they were evaluated.
    """
    best: dict[str, float] = {}
    for key, found in scores_by_set(evaluated or {}, scored or {}).items():
        task = (evaluated or {})[key].task
        best.setdefault(task.name, found[primary_name(task.metrics[0], found)])  # the first of several splits
    return [rows.task.describe(max_length=rows.max_length, score=best.get(rows.task.name)) for rows in training.tasks]


def scores_by_set(evaluated: Mapping[str, EncodedTask], scored: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The scores of each evaluation set, without its loss, from what `evaluate` returned."""
    found: dict[str, dict[str, float]] = {}
    for entry, value in scored.items():
        keys = [key for key in evaluated if entry.startswith(f"eval_{key}_")]
        if not keys or entry.removeprefix("eval_") in _SPEED:
            continue
        key = max(keys, key=len)  # one task's name may be a prefix of another's
        metric = entry.removeprefix(f"eval_{key}_")
        if metric != "loss":
            found.setdefault(key, {})[metric] = float(value)
    return {key: found[key] for key in evaluated if key in found}


def logged_at(history: list[dict[str, Any]], step: int | None) -> dict[str, Any] | None:
    """The last evaluation of all tasks logged at a step, if any."""
    for entry in reversed(history):
        if "eval_average" in entry and entry.get("step") == step:
            return entry
    return None
