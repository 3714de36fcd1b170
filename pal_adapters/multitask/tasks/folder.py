"""Reads a folder with `task.yaml` and one data file for each split."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import yaml

from pal_adapters.errors import ConfigError

from .reading import FORMATS, read_file, split_files
from .types import TaskDataError


def read_folder(folder: Path, allowed: Iterable[str]) -> tuple[dict[str, Any], dict[str, datasets.Dataset]]:
    """The fields of the task, and its splits. See `Task.from_folder`.

    Args:
        folder: The folder.
        allowed: Fields that `task.yaml` may set.
    """
    path = folder / "task.yaml"
    if not path.is_file():
        raise TaskDataError(f"{path} does not exist: the folder of a task needs this file, with the fields of Task")
    try:
        text = path.read_text(encoding="utf-8")
        given = yaml.safe_load(text)
        if isinstance(given, dict) and "label_names" in given:
            given["label_names"] = yaml.load(text, yaml.BaseLoader)["label_names"]  # `no` and `yes` are names here
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskDataError(f"{path}: invalid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(given, dict):
        raise TaskDataError(f"{path}: not a mapping of the fields of Task")
    unknown = sorted(map(str, set(given) - set(allowed)))
    if unknown:
        raise ConfigError(f"{path}: unknown field {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    given.setdefault("name", folder.name)
    splits = {split: read_file(file) for split, file in split_files(folder).items()}
    if not splits:
        raise TaskDataError(f"{folder}: no data; expected files such as train.jsonl (allowed: {FORMATS})")
    return given, splits
