"""Finds a GLUE or SuperGLUE task and its splits, in a folder or on the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from .glue import TASKS, find_tasks
from .reading import FORMATS, HUB, quiet, read_file, read_hub, split_files
from .types import TaskDataError


def read_benchmark(name: str, data_dir: str | Path | None) -> tuple[str, dict[str, datasets.Dataset], dict[str, str]]:
    """A task by name, with its training and validation splits.

    Args:
        name: Name of the task in any spelling, such as `rte`, `STS-B` or `super_glue/rte`.
        data_dir: See `Task.named`.

    Returns:
        The full name of the task, its splits, and where each split came from. All columns are kept. Labels are
        integers, or floats for a regression. Test splits have no public labels and are left out.

    Raises:
        TaskDataError: For an unknown task, and for a split that is missing or cannot be read.
    """
    candidates = find_tasks(name)
    if data_dir is None:
        full = candidates[0]
        benchmark, short = full.split("/")
        loaded: Mapping[str, datasets.Dataset] = read_hub(benchmark, short)
        wanted = _wanted(full, loaded, "the Hub")
        splits = {split: loaded[split] for split in wanted}
        places = {split: f"{HUB[benchmark]} ({short}, {split})" for split in wanted}
    else:
        full, folder = _find_folder(candidates, Path(data_dir))
        files = split_files(folder)
        wanted = _wanted(full, files, str(folder))
        splits = {split: read_file(files[split]) for split in wanted}
        places = {split: str(files[split]) for split in wanted}
    return full, {split: _typed(full, rows) for split, rows in splits.items()}, places


def _wanted(full: str, there: Mapping[str, Any], place: str) -> list[str]:
    """The splits to read: training, the first validation split, and any other validation splits there are."""
    needed, *others = TASKS[full].get("validation_splits", ("validation",))
    for split in ("train", needed):
        if split not in there:
            raise TaskDataError(
                f"task {full.split('/')[1]!r}: {place} has no split {split!r}; found: {', '.join(there) or 'none'} "
                f"(files end in {FORMATS})"
            )
    return ["train", needed, *(split for split in others if split in there)]


def _typed(full: str, rows: datasets.Dataset) -> datasets.Dataset:
    """The examples with labels of the task's own type: class numbers may come as `ClassLabel`, floats as integers."""
    regression = TASKS[full].get("kind") == "regression"
    label: Any = rows.features.get("label")
    if isinstance(label, datasets.ClassLabel) or (regression and getattr(label, "dtype", "").startswith("int")):
        with quiet():
            return rows.cast_column("label", datasets.Value("float64" if regression else "int64"))
    return rows


def _find_folder(candidates: Sequence[str], root: Path) -> tuple[str, Path]:
    """The folder of the task, and which of the tasks of that name it holds."""
    if not root.is_dir():
        raise TaskDataError(f"data_dir {root} is not a folder")
    # `root` may itself be the folder of a benchmark, under its own or any other name.
    named = next((full for full in candidates if full.split("/")[0] == root.name), candidates[0])
    places = [*((full, root / full) for full in candidates), (named, root / named.split("/")[1])]
    for full, folder in places:
        if folder.is_dir():
            return full, folder
    looked = " or ".join(str(folder) for _, folder in places)
    raise TaskDataError(f"task {named.split('/')[1]!r}: no folder {looked}")
