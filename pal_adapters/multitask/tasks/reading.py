"""Reads the data of a task from JSON lines or from the hub, and says exactly what is wrong with them."""

from __future__ import annotations

import gzip
import json
import math
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .glue import TaskDataError, TaskSpec, find_tasks

_HUB = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}
_SUFFIXES = (".jsonl", ".jsonl.gz")


def load_task(name: str, data_dir: str | Path | None = None) -> tuple[TaskSpec, datasets.DatasetDict]:
    """Loads the training and validation rows of a task and checks every one of them.

    Args:
        name: Name of the task in any spelling, such as `rte`, `STS-B` or `super_glue/rte`.
        data_dir: Folder with `<task>/train.jsonl` and `<task>/validation.jsonl` (or `.jsonl.gz`; MNLI has
            `validation_matched` and, optionally, `validation_mismatched`), or a folder that has `glue` and
            `super_glue` with such folders inside. `None` takes the data set of that name from the Hugging Face hub.

    Returns:
        The task and its splits: "train" and those of `TaskSpec.validation_splits`. All columns are kept. Labels are
        integers, or floats for a regression. Test splits have no public labels and are left out.

    Raises:
        TaskDataError: For an unknown task, a missing file or column, a file that cannot be read, a split without
            rows, and labels that the task does not have. One line, which names the place.
    """
    if data_dir is None:
        spec = find_tasks(name)[0]
        return spec, _prepare(spec, _from_hub(spec), {})
    root = Path(data_dir)
    candidates = find_tasks(name)
    if not root.is_dir():
        raise TaskDataError(f"data_dir {root} is not a folder")
    spec, folder = _find_folder(candidates, root)
    files = {"train": _find_file(spec, folder, "train")}
    for position, split in enumerate(spec.validation_splits):
        if position == 0 or any((folder / f"{split}{suffix}").exists() for suffix in _SUFFIXES):
            files[split] = _find_file(spec, folder, split)
    for file in files.values():
        _check_rows(spec, read_json_lines(file), where=str(file))
    return spec, _prepare(spec, _from_json(files), {split: str(file) for split, file in files.items()})


def load_rows(benchmark: str, name: str, data_dir: str | Path | None, splits: Sequence[str]) -> datasets.DatasetDict:
    """The rows of a data set as they are, from `<data_dir>/<name>/<split>.jsonl[.gz]` or from the hub.

    Raises:
        TaskDataError: If a file is missing or cannot be read.
    """
    if data_dir is None:
        try:
            with quiet():
                return datasets.load_dataset(_HUB[benchmark], name)
        except Exception as error:  # the errors of the network, of the hub and of `datasets` have no common base
            raise TaskDataError(f"task {name!r}: cannot load it from the hub ({_first_line(error)})") from error
    root = Path(data_dir)
    places = [root / benchmark / name, root / name]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise TaskDataError(f"task {name!r}: no folder {places[0]} or {places[1]}")
    files = {}
    for split in splits:
        found = [folder / f"{split}{suffix}" for suffix in _SUFFIXES if (folder / f"{split}{suffix}").is_file()]
        if len(found) != 1:
            raise TaskDataError(f"task {name!r}: {len(found)} files {folder / split}.jsonl[.gz]; one is needed")
        files[split] = found[0]
    return _from_json(files)


def train_dev_split(
    dataset: datasets.Dataset,
    fraction: float = 0.1,
    seed: int = 42,
    *,
    label_column: str = "label",
    split_columns: Sequence[str] = (),
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cuts a training set in two: one part to train on, one to choose the best epoch with.

    Args:
        dataset: The training rows.
        fraction: Share of the rows in the second part.
        seed: Seed of the draw. The same seed gives the same rows.
        label_column: Column to stratify by. Each class gives the same share of its rows, and at least one if it has
            two; a column of floats (a regression) is not stratified.
        split_columns: If given, rows that agree in all these columns stay together, and labels do not count.

    Returns:
        The rows to train on and the rows to choose with, both in the order of `dataset`.

    Raises:
        ValueError: If `fraction` is not between 0 and 1.
        TaskDataError: If there are too few rows to have some in both parts.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1 (both excluded), got {fraction}")
    rng = np.random.default_rng(seed)
    count = len(dataset)
    held_out: list[int] = []
    if split_columns:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, key in enumerate(zip(*(dataset[column] for column in split_columns), strict=True)):
            groups.setdefault(key, []).append(index)
        members = list(groups.values())
        for position in rng.permutation(len(members))[: max(len(members) - 1, 0)]:
            if len(held_out) >= fraction * count:
                break
            held_out += members[position]
    elif dataset.features[label_column].dtype.startswith("float"):
        held_out = rng.permutation(count)[: max(1, round(count * fraction))].tolist()
    else:
        labels = np.asarray(dataset[label_column])
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            size = round(len(rows) * fraction)
            held_out += rows[: max(size, 1) if len(rows) > 1 else 0].tolist()
    if not 0 < len(held_out) < count:
        raise TaskDataError(f"a training set of {count} rows cannot be cut in two with fraction {fraction}")
    chosen = set(held_out)
    return dataset.select([i for i in range(count) if i not in chosen]), dataset.select(sorted(chosen))


def _find_folder(candidates: Sequence[TaskSpec], root: Path) -> tuple[TaskSpec, Path]:
    """The folder of the task, and which of the tasks of that name it holds."""
    below = [(spec, root / spec.benchmark / spec.name) for spec in candidates]
    # `root` may itself be the folder of a benchmark, under its own or any other name.
    named = [spec for spec in candidates if spec.benchmark == root.name] or list(candidates)
    places = [*below, (named[0], root / named[0].name)]
    for spec, folder in places:
        if folder.is_dir():
            return spec, folder
    looked = " or ".join(str(folder) for _, folder in places)
    raise TaskDataError(f"task {candidates[0].name!r}: no folder {looked}")


def _find_file(spec: TaskSpec, folder: Path, split: str) -> Path:
    places = [folder / f"{split}{suffix}" for suffix in _SUFFIXES]
    found = [path for path in places if path.is_file()]
    if len(found) > 1:
        raise TaskDataError(f"task {spec.name!r}: both {found[0]} and {found[1].name} exist; keep one of them")
    if not found:
        raise TaskDataError(f"task {spec.name!r}: no file {places[0]} (nor {places[1].name})")
    return found[0]


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, value). Empty lines are skipped, as `datasets` does."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskDataError(f"{path}: line {number} is not valid JSON ({error.msg})") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        kind = "gzip file" if path.suffix == ".gz" else "text file"
        raise TaskDataError(f"{path}: not a readable UTF-8 {kind} ({error})") from error


def _check_rows(spec: TaskSpec, rows: Iterable[tuple[int, Any]], *, where: str) -> None:
    count = 0
    for number, row in rows:
        count += 1
        if not isinstance(row, Mapping):
            raise TaskDataError(f"{where}: row {number} is {row!r:.40}, not an object with columns")
        for column in (*spec.text_columns, spec.label_column):
            if column not in row:
                found = ", ".join(sorted(row)) or "none"
                raise TaskDataError(
                    f"{where}: row {number} has no column {column!r}, which {spec.full_name} needs; found: {found}"
                )
        for column in spec.text_columns:
            if not column.endswith("_index") and not isinstance(row[column], str):
                raise TaskDataError(f"{where}: row {number}: column {column!r} holds {row[column]!r:.40}, not a text")
        _check_label(spec, row[spec.label_column], f"{where}: row {number}")
        try:
            spec.segments(row)
        except TaskDataError as error:
            raise TaskDataError(f"{where}: row {number}: {error}") from error
    if count == 0:
        raise TaskDataError(f"{where}: no rows")


def _check_label(spec: TaskSpec, label: Any, where: str) -> None:
    allowed_types = (int, float) if spec.is_regression else (int,)
    if isinstance(label, bool) or not isinstance(label, allowed_types):
        problem = "of the wrong type"
    elif spec.is_regression:
        low, high = spec.label_range or (-math.inf, math.inf)
        problem = "" if low <= label <= high else "out of range"
    else:
        problem = "" if 0 <= label < spec.num_labels else "out of range"
    if problem:
        raise TaskDataError(f"{where}: label {label!r:.40} is {problem}; allowed: {spec.allowed_labels()}")


def _from_json(files: Mapping[str, Path]) -> datasets.DatasetDict:
    """Loads checked files. A cache of its own, read into memory and dropped, rules out rows of an older file."""
    with tempfile.TemporaryDirectory(prefix="pal_adapters_data_") as cache, quiet():
        try:
            return datasets.load_dataset(
                "json",
                data_files={split: str(file) for split, file in files.items()},
                cache_dir=cache,
                keep_in_memory=True,
            )
        except Exception as error:  # whatever the host's reader dislikes in columns that are not ours
            cause = error.__cause__ or error
            names = ", ".join(str(file) for file in files.values())
            raise TaskDataError(f"datasets cannot read {names} ({_first_line(cause)})") from error


def _from_hub(spec: TaskSpec) -> datasets.DatasetDict:
    repository = _HUB[spec.benchmark]
    try:
        with quiet():
            return datasets.load_dataset(repository, spec.name)
    except Exception as error:  # the errors of the network, of the hub and of `datasets` have no common base
        raise TaskDataError(
            f"task {spec.name!r}: cannot load {repository} ({spec.name}) from the hub ({_first_line(error)}); "
            "set data_dir to read local files"
        ) from error


def _prepare(spec: TaskSpec, loaded: datasets.DatasetDict, files: Mapping[str, str]) -> datasets.DatasetDict:
    """Keeps the labelled splits, checks what came from the hub, and gives the label its own type."""
    value = datasets.Value("float64" if spec.is_regression else "int64")
    splits = datasets.DatasetDict()
    for split in ("train", *spec.validation_splits):
        if split not in loaded:
            if split in ("train", spec.validation_splits[0]):
                raise TaskDataError(f"task {spec.name!r}: the hub has no split {split!r}; found: {', '.join(loaded)}")
            continue
        rows = loaded[split]
        if split not in files:
            _check_rows(spec, enumerate(rows, start=1), where=f"{_HUB[spec.benchmark]} ({spec.name}, {split})")
        with quiet():
            same = rows.features[spec.label_column] == value
            splits[split] = rows if same else rows.cast_column(spec.label_column, value)
    return splits


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the bars of `datasets` for a while, and leaves them as they were."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
