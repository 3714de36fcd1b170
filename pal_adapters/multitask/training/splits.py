"""Which examples of the tasks a run trains and evaluates on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.metrics.custom import SplitMetric, metric_name
from pal_adapters.multitask.tasks.encoding import EncodedTask
from pal_adapters.multitask.tasks.task import Task

Rows = Any
"""Examples of a task: an `EncodedTask`, or any type that `Task` accepts."""


class Encode(Protocol):
    """Encodes the examples of a task."""

    def __call__(self, task: Task, rows: Rows, where: str, *, needs_labels: bool = True) -> EncodedTask:
        """The encoded examples, or `rows` itself if it is an `EncodedTask`."""
        ...


def encoded(
    task: Task, rows: Rows, where: str, *, tokenizer: Any, max_length: int, needs_labels: bool = True
) -> EncodedTask:
    """The encoded examples, or `rows` itself if it is an `EncodedTask`."""
    if not isinstance(rows, EncodedTask):
        return EncodedTask(task, rows, tokenizer, max_length, where=where, needs_labels=needs_labels)
    if needs_labels and not rows.has_labels:
        raise ConfigError(f"task {task.name!r}, {where}: the examples have no labels; they can only be predicted.")
    return rows


def require_by_task(argument: str, given: object) -> None:
    """Raise `ConfigError` unless examples are given by task."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(
            f"{argument} is of type {type(given).__name__}, but every task has its own examples: pass a dict, "
            f"such as {argument}={{'rte': rows}}, or leave it out and give the splits to the tasks, such as "
            "tasks=[Task('rte', {'train': rows, 'validation': rows}, ...)]."
        )


def training_sets(
    tasks: Mapping[str, Task], given: Mapping[str, Rows] | None, encode: Encode
) -> dict[str, EncodedTask]:
    """The training examples by task: those given, or the task's own training split."""
    unknown = [name for name in given or () if name not in tasks]
    if unknown:
        raise ConfigError(f"train_dataset has {unknown[0]!r}, which is not a task: {', '.join(tasks)}.")
    found = {}
    for name, task in tasks.items():
        if given is not None and name in given:
            rows = given[name]
        elif task.train_split in task.dataset:
            rows = task.dataset[task.train_split]
        else:
            there = ", ".join(task.dataset) or "none"
            raise ConfigError(f"task {name!r} has no split {task.train_split!r} to train on; it has: {there}.")
        found[name] = encode(task, rows, "training")
    return found


def evaluation_sets(
    tasks: Mapping[str, Task],
    given: Mapping[str, Rows] | None,
    encode: Encode,
    *,
    needed: bool,
    argument: str = "eval_dataset",
) -> dict[str, EncodedTask]:
    """The examples to evaluate on or to predict, by the name of their set.

    Args:
        tasks: The tasks by name.
        given: Examples by task, or `None` for the validation splits of the tasks.
        encode: Encodes them.
        needed: Whether every task needs a validation split.
        argument: Name of the argument that they were passed as; those of `test_dataset` may lack labels.
    """
    require_by_task(argument, given)
    found: dict[str, EncodedTask] = {}
    if given is not None:
        for name, rows in given.items():
            task = rows.task if isinstance(rows, EncodedTask) else tasks.get(name)
            if task is None or task.name not in tasks:
                raise ConfigError(f"{argument} has {name!r}, which is not a task: {', '.join(tasks)}.")
            found[name] = encode(task, rows, f"{argument}[{name!r}]", needs_labels=argument != "test_dataset")
        return found
    for name, task in tasks.items():
        splits = task.validation()
        if needed and not splits:
            wanted = " or ".join(map(repr, task.validation_splits)) or "in validation_splits"
            raise ConfigError(
                f"task {name!r} has no split {wanted} to evaluate on: give it one, or pass "
                "eval_dataset={...} with the tasks to evaluate, or eval_strategy='no'."
            )
        for key, rows in splits.items():
            if key in found:
                raise ConfigError(f"two evaluation sets are called {key!r}: rename task {name!r}.")
            found[key] = encode(task, rows, f"evaluation set {key}")
    return found


def sets_to_evaluate(
    tasks: Mapping[str, Task], own: Mapping[str, EncodedTask], given: Any, encode: Encode
) -> Mapping[str, EncodedTask]:
    """The evaluation sets of one call: those given, the one that `given` names, or `own`, those of the run."""
    if isinstance(given, str):
        if given not in own:
            raise ConfigError(f"eval_dataset={given!r} is not one of: {', '.join(own) or 'none'}.")
        return {given: own[given]}
    sets = own if given is None else evaluation_sets(tasks, given, encode, needed=True)
    if not sets:
        raise ConfigError("there is nothing to evaluate: no task has validation examples.")
    return sets


def check_score_names(sets: Mapping[str, EncodedTask], best: str | None) -> None:
    """Raise `ConfigError` for two scores of the same name, and for a best metric that no evaluation returns.

    To learn the names of its scores, a custom metric is called once with the labels as predictions, but only if its
    task has other metrics or no known score is called `best`.

    Args:
        sets: The evaluation sets by name.
        best: `metric_for_best_model`.
    """
    names = ["average", "loss", *(f"{key}_loss" for key in sets)]
    unsure = {}
    for key, rows in sets.items():
        metrics = rows.task.metrics
        custom = any(not isinstance(metric, (str, SplitMetric)) for metric in metrics)
        if custom and len(metrics) > 1:
            names += [f"{key}_{name}" for name in rows.score_names()]
        elif custom:
            unsure[key] = rows
            names.append(f"{key}_{metric_name(metrics[0])}")
        else:
            found = [metric.gives if isinstance(metric, SplitMetric) else (metric,) for metric in metrics]
            names += [f"{key}_{name}" for several in found for name in several]
    if best is None or not sets:
        return
    wanted = best.removeprefix("eval_")
    if wanted in names:
        return
    names += [f"{key}_{name}" for key, rows in unsure.items() for name in rows.score_names()]
    if wanted not in names:
        raise ConfigError(
            f"metric_for_best_model={best!r} is not returned by any evaluation: use one of {', '.join(names)}."
        )
