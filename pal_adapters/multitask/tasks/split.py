"""Splits a training set in two: one part to train on, one to select the best checkpoint with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from pal_adapters.checks import list_of, number, require_int, string
from pal_adapters.errors import ConfigError

from .types import TaskDataError


def train_dev_split(
    dataset: datasets.Dataset,
    fraction: float = 0.1,
    seed: int = 42,
    *,
    label_column: str | None = "label",
    split_columns: Sequence[str] = (),
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits a training set in two: one part to train on, one to select the best checkpoint with.

    Args:
        dataset: The training examples.
        fraction: Share of the examples in the second part.
        seed: Seed of the draw. The same seed gives the same parts.
        label_column: Column to stratify by. The second part gets the same share of the examples of each class, and at
            least one if it has two or more. A column of floats (a regression) is not stratified, nor is `None`.
        split_columns: If given, examples that agree in all these columns stay together, and labels are ignored.

    Returns:
        The examples to train on and those to select with, both in the order of `dataset`.

    Raises:
        ConfigError: If `dataset` is not a `datasets.Dataset`, or `fraction` is not between 0 and 1.
        TaskDataError: If there are too few examples to have some in both parts, or a column is missing or holds lists,
            dicts or `None`.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ConfigError(f"dataset is of type {type(dataset).__name__}: pass a datasets.Dataset.")
    number(0, 1, above=True, below=True)("fraction", fraction)
    require_int("seed", seed, minimum=0)
    if isinstance(split_columns, str):
        split_columns = (split_columns,)
    list_of(string(empty=False), "column names")("split_columns", split_columns)
    for column in split_columns or ([] if label_column is None else [label_column]):
        _check_column(dataset, column)
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
    elif label_column is None or dataset.features[label_column].dtype.startswith("float"):
        held_out = rng.permutation(count)[: max(1, round(count * fraction))].tolist()
    else:
        labels = np.asarray(dataset[label_column])
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            size = round(len(rows) * fraction)
            held_out += rows[: max(size, 1) if len(rows) > 1 else 0].tolist()
    if not 0 < len(held_out) < count:
        raise TaskDataError(f"a training set of {count} examples cannot be split in two with fraction {fraction}")
    chosen = set(held_out)
    return dataset.select([i for i in range(count) if i not in chosen]), dataset.select(sorted(chosen))


def _check_column(dataset: datasets.Dataset, column: str) -> None:
    if column not in dataset.column_names:
        raise TaskDataError(f"no column {column!r}; found: {', '.join(dataset.column_names)}")
    if not isinstance(dataset.features[column], (datasets.Value, datasets.ClassLabel)):
        raise TaskDataError(f"column {column!r} holds lists or dicts: use label_column=None, or a column of values")
    missing = next((row for row, value in enumerate(dataset[column][:], start=1) if value is None), 0)
    if missing:
        raise TaskDataError(f"row {missing}: column {column!r} holds None")
