"""The examples of a split as a `datasets.Dataset`, and the class names that they carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import pandas

from pal_adapters.errors import ConfigError

ALLOWED = "a datasets.Dataset, a list of dicts (one for each example) or a pandas.DataFrame"


def as_dataset(rows: Any, where: str) -> datasets.Dataset:
    """The examples as a `datasets.Dataset`.

    Args:
        rows: A `datasets.Dataset`, a list of dicts, or a `pandas.DataFrame`, whose index is dropped.
        where: What error messages call the examples.

    Raises:
        ConfigError: For any other type.
    """
    if isinstance(rows, datasets.Dataset):
        return rows
    if isinstance(rows, datasets.IterableDataset):
        raise ConfigError(
            f"{where} is an IterableDataset, whose examples cannot be read in random order: load it without "
            "streaming=True, or pass datasets.Dataset.from_list(list(rows))."
        )
    try:
        if isinstance(rows, pandas.DataFrame):
            return datasets.Dataset.from_pandas(rows, preserve_index=False)
        if isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) for row in rows):
            # Columns in the order in which they first occur; `from_list` reads only those of the first example.
            columns = dict.fromkeys(name for row in rows for name in row)
            return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's own errors are ValueErrors or TypeErrors
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where} cannot be converted to a datasets.Dataset ({reason:.200}): give each column one type."
        ) from error
    raise ConfigError(f"{where} is of type {type(rows).__name__}: pass {ALLOWED}.")


def plain_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """The examples as Python numbers and lists, whatever `set_format` made of them; transforms are kept."""
    return rows if rows.format["type"] in (None, "custom") else rows.with_format(None)


def columns_of(rows: datasets.Dataset) -> list[str]:
    """The columns that can be read: those that a transform, if there is one, does not drop."""
    kept = rows[0] if rows.format["type"] == "custom" and len(rows) else rows.column_names
    return [name for name in rows.column_names if name in kept]


def class_names(rows: Any, column: str | None) -> tuple[str, ...]:
    """Class names of a column of `datasets.ClassLabel`, or of lists of them; empty for any other column."""
    feature: Any = rows.features.get(column) if isinstance(rows, datasets.Dataset) else None
    feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return tuple(feature.names or ()) if isinstance(feature, datasets.ClassLabel) else ()


def text_labels(rows: Any, column: str | None) -> tuple[str, ...]:
    """The distinct labels of a column of strings, or of lists of strings, sorted; empty for any other column."""
    if not isinstance(rows, datasets.Dataset) or column not in columns_of(rows):
        return ()
    found = {label for label in _flat(plain_rows(rows)[column][:]) if label not in (None, "", "-1")}
    return tuple(sorted(found)) if all(isinstance(label, str) for label in found) else ()


def _flat(labels: Iterable[Any]) -> Iterable[Any]:
    for label in labels:
        if isinstance(label, (list, tuple)):
            yield from _flat(label)
        elif not isinstance(label, Mapping):
            yield label
