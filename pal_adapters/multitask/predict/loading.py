"""The parts of a `Predictor`: read from a folder, or put together from a model and its tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError, StorageError
from pal_adapters.multitask.model.files import cause_of, inside
from pal_adapters.multitask.model.hub import fetch
from pal_adapters.multitask.model.task_description import TaskDescription, default_length
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.model.tasks_file import check_name
from pal_adapters.multitask.tasks.described import described_task
from pal_adapters.multitask.tasks.task import Task

from .engines import Engine
from .served import ServedTask, ServedTasks


def served_tasks(
    engine: Engine, tokenizer: Any, tasks: Iterable[Task | TaskDescription] | None
) -> dict[str, ServedTask]:
    """The tasks of a model that requests may ask for.

    Args:
        engine: The model.
        tokenizer: Its tokenizer.
        tasks: See `Predictor`.

    Raises:
        ConfigError: For a task that the model lacks, or that does not fit its head.
    """
    given = list(engine.described().values()) if tasks is None else list(tasks)
    if not given:
        raise ConfigError(
            "the model does not say how its tasks are encoded: pass tasks=[Task(...), ...] with the text columns and "
            "label names of each."
        )
    heads = engine.heads()
    found: dict[str, ServedTask] = {}
    for one in given:
        if not isinstance(one, (Task, TaskDescription)):
            raise ConfigError(f"tasks has a {type(one).__name__}: pass Task or TaskDescription objects.")
        check_name(one.name, heads, found)
        found[one.name] = served_task(one, engine, tokenizer)
    return found


def served_task(one: Task | TaskDescription, engine: Engine, tokenizer: Any) -> ServedTask:
    """One task of a model.

    Raises:
        ConfigError: If it does not fit its head, or its `max_length` leaves no room for text.
    """
    head = engine.heads()[one.name]
    if isinstance(one, Task):
        task, description = one, one.describe(max_length=default_length(tokenizer))
        description.check_head(head)
    else:
        description, task = one, described_task(one, head)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if description.max_length <= special:
        raise ConfigError(
            f"task {one.name!r}: max_length={description.max_length} is not allowed: {special} special tokens leave "
            "no room for text."
        )
    return ServedTask(description, task, head, engine.group(one.name))


def grown(served: ServedTasks, more: TaskDescription, engine: Engine, tokenizer: Any) -> ServedTasks:
    """The tasks plus one more."""
    tasks = {**served.tasks, more.name: served_task(more, engine, tokenizer)}
    return ServedTasks(_regrouped(tasks, engine), tokenizer)


def shrunk(served: ServedTasks, name: str, engine: Engine, tokenizer: Any) -> ServedTasks:
    """The tasks without one of them."""
    tasks = {task: one for task, one in served.tasks.items() if task != name}
    return ServedTasks(_regrouped(tasks, engine), tokenizer)


def _regrouped(tasks: Mapping[str, ServedTask], engine: Engine) -> dict[str, ServedTask]:
    """The tasks, regrouped: which of them may share a batch can depend on all adapters of a model."""
    return {name: replace(one, group=engine.group(name)) for name, one in tasks.items()}


def load_predictor(
    directory: str | Path,
    *,
    tasks: Iterable[Task | TaskDescription] | None,
    backbone: Any,
    processing_class: Any,
    device: Any,
    dtype: torch.dtype | str | None,
    revision: str | None,
    token: str | bool | None,
) -> tuple[TaskHeads, Any, list[Task | TaskDescription]]:
    """The model, the tokenizer and the tasks of a folder, see `Predictor.from_pretrained`."""
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ConfigError(f"dtype={dtype!r} is not allowed: use a floating-point type, such as 'bfloat16'.")
    folder = fetch(directory, revision=revision, token=token)
    model = TaskHeads.from_pretrained(folder, backbone)
    tokenizer = load_tokenizer(folder) if processing_class is None else processing_class
    known: dict[str, Task | TaskDescription] = dict(model.described)
    for one in tasks or ():
        known[one.name] = one
    missing = [task for task in model.tasks if task not in known]
    if missing:
        raise ConfigError(
            f"{directory} does not say how task {missing[0]!r} is encoded, as folders of earlier releases do not: "
            f"pass tasks=[Task({missing[0]!r}, {{}}, text_columns=..., label_names=...), ...]."
        )
    if kind is not None:
        model.to(kind)
    if device is not None:
        model.to(torch.device(device))
    return model, tokenizer, list(known.values())


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        ConfigError: If the folder has none.
        StorageError: If it is damaged, or a file is a link that leads out of the folder.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ConfigError(
            f"{folder} has no tokenizer: pass processing_class=, the one that the model was trained with."
        )
    for path in folder.iterdir():
        inside(folder, path.name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # readers of damaged tokenizers raise errors without a common base
        raise StorageError(f"{folder}: the tokenizer cannot be loaded ({cause_of(error)}).") from error
