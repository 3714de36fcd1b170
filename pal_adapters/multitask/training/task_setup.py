"""Prepares a model for the tasks of a run: adds missing heads, and warns of adapters that do not train."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.model.heads import Head, HeadConfig
from pal_adapters.multitask.model.routes import adapters_in, is_fuse
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.tasks.encoding import EncodedTask
from pal_adapters.multitask.tasks.task import Task


def add_heads(model: TaskHeads, tasks: Mapping[str, Task], training: Mapping[str, EncodedTask]) -> None:
    """Adds the heads that the model lacks. New regression heads start at the mean of their labels.

    Args:
        model: The model.
        tasks: The tasks by name.
        training: Their training examples.

    Raises:
        ConfigError: If an existing head does not fit its task.
    """
    for task in tasks.values():
        if task.name not in model.routes:
            head = task.head or task.head_config()
            model.add(task.name, head, adapter=task.adapter, weight=task.weight, loss=task.loss)
        else:
            _take_over(model, task)
        there, wanted = model.head(task.name).config, task.head_config()
        if _shape(there) != _shape(wanted):
            raise ConfigError(
                f"task {task.name!r}: its head on the model is {there.kind} with {there.num_labels} labels, but the "
                f"task is {wanted.kind} with {wanted.num_labels}."
            )
    for rows in training.values():
        _start_at_mean(model.head(rows.task.name), rows)


def _take_over(model: TaskHeads, task: Task) -> None:
    """Applies the weight and the loss of a task to an existing head; rejects whatever contradicts the model."""
    route, head = model.routes[task.name], model.head(task.name)
    if task.weight != 1.0 and route.weight not in (1.0, task.weight):
        raise ConfigError(
            f"task {task.name!r}: weight={task.weight:g}, but on the model it has {route.weight:g}: leave one out."
        )
    if task.loss is not None and head.own_loss not in (None, task.loss):
        raise ConfigError(f"task {task.name!r}: loss is given, but its head on the model has another: leave one out.")
    others = [name for name, other in model.routes.items() if other.head == route.head and name != task.name]
    if task.loss is not None and head.own_loss is None and others:
        raise ConfigError(
            f"task {task.name!r}: loss is not allowed, as {others[0]!r} has the same head: give it to "
            "TaskHeads.add when the head is made."
        )
    defaults = {one.name: one.default for one in fields(Task)}
    for name, there in (("pooling", head.config.pooling), ("dropout", head.config.dropout)):
        wanted = getattr(task, name)
        if wanted not in (defaults[name], there):
            raise ConfigError(
                f"task {task.name!r}: {name}={wanted!r}, but its head on the model has {there!r}: make the head with "
                f"TaskHeads.add(name, task.head_config()), or leave {name} out."
            )
    if task.head not in (None, route.head):
        raise ConfigError(
            f"task {task.name!r}: head={task.head!r}, but on the model it has {route.head!r}: leave it out."
        )
    if task.adapter != "auto" and task.adapter != route.adapter:
        raise ConfigError(
            f"task {task.name!r}: adapter={task.adapter!r}, but on the model it has {route.adapter!r}: leave it out."
        )
    if task.weight != 1.0:
        route.weight = float(task.weight)
    if task.loss is not None:
        head.own_loss = task.loss


def warn_of_resting_adapters(model: TaskHeads, tasks: Iterable[str]) -> None:
    """Warns of tasks whose adapter is entirely frozen: by default PEFT trains only the first of several."""
    added = model.added_parameters()
    for task in tasks:
        adapter = model.routes[task].adapter
        names = {adapter.name} if is_fuse(adapter) else set(adapters_in(adapter))
        own = [parameter for name, parameter in added.items() if names & set(name.split("."))]
        if own and not any(parameter.requires_grad for parameter in own):
            warnings.warn(
                f"task {task!r}: its adapter ({', '.join(sorted(names))}) is frozen. Call model.prepare_training() to "
                "train the adapters and heads of all tasks.",
                stacklevel=3,
            )


def _shape(head: HeadConfig) -> tuple[Any, ...]:
    return head.kind, head.num_labels, head.num_choices


def _start_at_mean(head: Head, rows: EncodedTask) -> None:
    """Sets the bias of a new regression head to the mean of the labels, which would be slow to learn."""
    if head.config.kind == "regression" and head.linear is not None and not head.linear.bias.any():
        mean = torch.as_tensor(rows.labels).double().mean(0)
        with torch.no_grad():
            head.linear.bias.copy_(mean.expand_as(head.linear.bias))
