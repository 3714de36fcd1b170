"""`tasks.json`, which says how the tasks of a folder are encoded and what their outputs are called.

Folders of earlier releases lack it. It is data: all of it is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pal_adapters.errors import ConfigError, StorageError

from .base import source_of
from .files import cause_of, inside, read_json
from .heads import HeadConfig
from .task_description import Describable, TaskDescription, default_length

TASKS_FILE = "tasks.json"
FORMAT = 1
_LARGEST = 10_000_000
_PACKAGES = ("pal-adapters", "transformers", "torch", "adapters", "peft")


def described_tasks(
    tasks: Iterable[Any], tokenizer: Any, heads: Mapping[str, HeadConfig]
) -> dict[str, TaskDescription]:
    """The descriptions of tasks.

    Args:
        tasks: A `TaskDescription` or a `Task` each.
        tokenizer: Sets the maximum length of each `Task`, at most 512.
        heads: The heads of the model by task.

    Raises:
        ConfigError: For a task that the model lacks, or that does not fit its head.
    """
    found: dict[str, TaskDescription] = {}
    for task in tasks:
        if isinstance(task, TaskDescription):
            one = task
        elif not isinstance(task, Describable):
            raise ConfigError(f"tasks has a {type(task).__name__}: pass Task or TaskDescription objects.")
        elif tokenizer is None:
            raise ConfigError("tasks needs processing_class, or descriptions: [task.describe(max_length=128), ...].")
        else:
            one = task.describe(max_length=default_length(tokenizer))
        check_name(one.name, heads, found)
        one.check_head(heads[one.name])
        found[one.name] = one
    return found


def check_name(name: str, heads: Collection[str], found: Collection[str]) -> None:
    """Raises `ConfigError` for a task that the model lacks, or that occurs twice."""
    if name not in heads:
        there = ", ".join(map(repr, heads)) or "none"
        raise ConfigError(f"tasks has {name!r}, which is not on the model: {there}.")
    if name in found:
        raise ConfigError(f"two tasks are called {name!r}: leave one of them out.")


def tasks_json(backbone: Any, described: Mapping[str, TaskDescription]) -> dict[str, Any]:
    """The content of the file: the tasks, the base model and its revision, and the versions that wrote it."""
    return {
        "format": FORMAT,
        "tasks": [description.to_dict() for description in described.values()],
        "base": {"id": source_of(backbone), "revision": getattr(backbone.config, "_commit_hash", None)},
        "versions": package_versions(),
    }


def package_versions(*more: str) -> dict[str, str]:
    """The versions of the packages that a folder depends on, and of `more`, as far as they are installed."""
    return {name: found for name in (*_PACKAGES, *more) if (found := _version(name)) is not None}


def read_tasks(directory: Path, heads: Mapping[str, HeadConfig]) -> dict[str, TaskDescription]:
    """The descriptions in a folder; none if it has no such file.

    Args:
        directory: The folder.
        heads: The heads of its tasks.

    Raises:
        StorageError: If the file is damaged, or does not describe the tasks of the folder.
    """
    path = inside(directory, TASKS_FILE)
    if not path.exists():
        return {}
    if path.stat().st_size > _LARGEST:
        raise StorageError(f"{path} is damaged: it has {path.stat().st_size} bytes.")
    stored = read_json(path)
    number = stored.get("format")
    if isinstance(number, bool) or number != FORMAT:
        raise StorageError(
            f"{path}: format={number!r:.40} is unknown, this release reads {FORMAT}: upgrade pal-adapters, or write "
            "the folder again."
        )
    try:
        return _checked(stored, heads)
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({cause_of(error)}).") from error


def _checked(stored: Mapping[str, Any], heads: Mapping[str, HeadConfig]) -> dict[str, TaskDescription]:
    if set(stored) != {"format", "tasks", "base", "versions"} or not isinstance(stored["tasks"], list):
        raise ConfigError("it needs tasks, base and versions.")
    base, versions = stored["base"], stored["versions"]
    good = isinstance(base, dict) and set(base) == {"id", "revision"} and isinstance(base["id"], str)
    if not good or not isinstance(base["revision"], (str, type(None))):
        raise ConfigError(f"base={base!r:.80}")
    if not isinstance(versions, dict) or not all(isinstance(value, str) for value in versions.values()):
        raise ConfigError(f"versions={versions!r:.80}")
    return described_tasks(map(TaskDescription.from_dict, stored["tasks"]), None, heads)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a host that is not installed, or a clone that is used in place
        return None
