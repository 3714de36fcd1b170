"""Types shared within this folder, and the error that it raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import datasets

from pal_adapters.errors import PalAdaptersError
from pal_adapters.multitask.model.heads import Kind

Segments = tuple[str, str | None]
"""The text of one encoder input: a single text (with `None`) or a pair of texts."""

Row = Mapping[str, Any]
"""One example as it is in the data: its columns by name."""


class TaskDataError(PalAdaptersError, ValueError):
    """An unknown task, or data that do not fit their task. The message is one line and says where the problem is."""


class TaskFields(Protocol):
    """The fields of a `Task` that the checks of its data read."""

    name: str
    dataset: Mapping[str, datasets.Dataset]
    kind: Kind
    text_columns: tuple[str, ...]
    label_column: str | None
    num_labels: int | None
    num_choices: int
    label_names: tuple[str, ...]
    label_range: tuple[float, float] | None
    train_split: str
    group_columns: tuple[str, ...]
    render: Callable[[Row], list[Segments]] | None
    expand: Callable[[datasets.Dataset], datasets.Dataset] | None
    benchmark: str

    def segments(self, row: Row) -> list[Segments]:
        """The encoder inputs of an example."""
        ...
