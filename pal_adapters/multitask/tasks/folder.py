"""Reads a folder with `task.yaml` and data files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from pal_adapters.errors import ConfigError

from .glue import TaskDataError
from .reading import read_json_lines

_NOT_IN_A_FILE = {"dataset", "loss", "render", "expand", "_choices"}


def read_folder(folder: Path) -> tuple[dict[str, Any], datasets.DatasetDict]:
    """The fields of the task, and its splits. See `Task.from_folder`."""
    import yaml

    from .task import Task

    path = folder / "task.yaml"
    if not path.is_file():
        raise TaskDataError(f"{path} is not there: a folder of a task has this file, with the fields of Task")
    try:
        text = path.read_text(encoding="utf-8")
        given = yaml.safe_load(text)
        if isinstance(given, dict) and "label_names" in given:
            given["label_names"] = yaml.load(text, yaml.BaseLoader)["label_names"]  # `no` and `yes` are names here
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
        try:
            splits[stem] = _READERS[suffix](path)
        except (OSError, EOFError, ValueError, pyarrow.ArrowException) as error:
            cause = str(error).strip().splitlines() or [type(error).__name__]
            raise TaskDataError(f"{path}: cannot be read ({cause[0]})") from error
    if not splits:
        raise TaskDataError(f"{folder}: no data; looked for files such as train.jsonl, train.csv and train.parquet")
    return splits


def _read_lines(path: Path) -> datasets.Dataset:
    rows = []
    for number, row in read_json_lines(path):
        if not isinstance(row, dict):
            raise TaskDataError(f"line {number} is {row!r:.40}, not an object with columns")
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def _read_json(path: Path) -> datasets.Dataset:
    """A list of rows, or JSON lines, which `Dataset.to_json` writes."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        text = file.read()
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return _read_lines(path)
    if isinstance(whole, dict) and len(text.splitlines()) == 1:
        return datasets.Dataset.from_list([whole])
    if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
        raise TaskDataError("neither a list of rows nor JSON lines; keep files that are no split in another folder")
    return datasets.Dataset.from_list(whole)


def _read_table(path: Path, delimiter: str = ",") -> datasets.Dataset:
    options = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    return datasets.Dataset(pyarrow.csv.read_csv(path, parse_options=options))


def _read_parquet(path: Path) -> datasets.Dataset:
    return datasets.Dataset(pyarrow.parquet.read_table(path))


_READERS: dict[str, Callable[[Path], datasets.Dataset]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": partial(_read_table, delimiter="\t"),
    ".parquet": _read_parquet,
}
