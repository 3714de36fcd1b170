"""Cuts a training set in two: one part to train on, one to choose the best checkpoint with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from .types import TaskDataError


def train_dev_split(
    dataset: datasets.Dataset,
    fraction: float = 0.1,
    seed: int = 42,
    *,
    label_column: str | None = "label",
    split_columns: Sequence[str] = (),
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cuts a training set in two: one part to train on, one to choose the best checkpoint with.

    Args:
        dataset: The training examples.
        fraction: Share of the examples in the second part.
        seed: Seed of the draw. The same seed gives the same parts.
        label_column: Column to stratify by. Each class gives the same share of its examples to the second part, and at
            least one if it has two. A column of floats (a regression) is not stratified, nor is `None`.
        split_columns: If given, examples that agree in all these columns stay together, and labels are ignored.

    Returns:
        The examples to train on and those to choose with, both in the order of `dataset`.

    Raises:
        ValueError: If `fraction` is not between 0 and 1.
        TaskDataError: If there are too few examples to have some in both parts.
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
    elif label_column is None or dataset.features[label_column].dtype.startswith("float"):
        held_out = rng.permutation(count)[: max(1, round(count * fraction))].tolist()
    else:
        labels = np.asarray(dataset[label_column])
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            size = round(len(rows) * fraction)
            held_out += rows[: max(size, 1) if len(rows) > 1 else 0].tolist()
    if not 0 < len(held_out) < count:
        raise TaskDataError(f"a training set of {count} examples cannot be cut in two with fraction {fraction}")
    chosen = set(held_out)
    return dataset.select([i for i in range(count) if i not in chosen]), dataset.select(sorted(chosen))
