"""Reads a folder with `task.yaml` and data files."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets

from pal_adapters.errors import ConfigError

from .data import quiet
from .tasks import TaskDataError

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_NOT_IN_A_FILE = {"dataset", "loss", "render", "expand", "_choices"}


def read_folder(folder: Path) -> tuple[dict[str, Any], datasets.DatasetDict]:
    """The fields of the task, and its splits. See `Task.from_folder`."""
    import yaml

    from .task import Task

    path = folder / "task.yaml"
    if not path.is_file():
        raise TaskDataError(f"{path} is not there: a folder of a task has this file, with the fields of Task")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskDataError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(given, dict):
        raise TaskDataError(f"{path}: not a mapping of the fields of Task")
    allowed = {f.name for f in fields(Task)} - _NOT_IN_A_FILE
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise ConfigError(f"{path}: unknown field {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    given.setdefault("name", folder.name)
    return given, _read_splits(folder)


def _read_splits(folder: Path) -> datasets.DatasetDict:
    splits = datasets.DatasetDict()
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".gz")
        stem, suffix = Path(name).stem, Path(name).suffix
        if suffix not in _READERS:
            continue
        if stem in splits:
            raise TaskDataError(f"{folder}: two files for the split {stem!r}; keep one of them")
        options = {"delimiter": "\t"} if suffix == ".tsv" else {}
        # A cache of its own, read into memory and dropped, rules out rows of an older file.
        with tempfile.TemporaryDirectory(prefix="pal_adapters_data_") as cache, quiet():
            try:
                splits[stem] = datasets.load_dataset(
                    _READERS[suffix],
                    data_files=str(path),
                    split="train",
                    cache_dir=cache,
                    keep_in_memory=True,
                    **options,
                )
            except Exception as error:  # whatever the readers dislike; they have no common base
                cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
                raise TaskDataError(f"{path}: cannot be read ({cause[0]})") from error
    if not splits:
        raise TaskDataError(f"{folder}: no data; looked for files such as train.jsonl, train.csv and train.parquet")
    return splits
