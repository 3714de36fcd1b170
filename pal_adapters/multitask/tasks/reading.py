"""Reads splits from files or from the Hugging Face Hub with `datasets` and `pandas`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import datasets
import pandas

from .rows import as_dataset
from .types import TaskDataError

HUB = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}
"""Hub repo ID of each benchmark."""

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": ",", ".tsv": "\t", ".parquet": "parquet"}
FORMATS = f"{', '.join(_FORMATS)}, each also with .gz"


def split_files(folder: Path) -> dict[str, Path]:
    """The data files of a folder by the split that each is named after, such as `train.jsonl.gz`.

    Raises:
        TaskDataError: If a split has two files.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".gz")
        split, suffix = Path(name).stem, Path(name).suffix
        if suffix not in _FORMATS or not path.is_file():
            continue
        if split in files:
            raise TaskDataError(f"two files for the split {split!r}: {files[split]} and {path.name}; keep one of them")
        files[split] = path
    return files


def read_file(path: Path) -> datasets.Dataset:
    """The examples of one file: a list of objects or JSON lines, a table with a header, or parquet.

    Raises:
        TaskDataError: If the file cannot be read.
    """
    kind = _FORMATS[Path(path.name.removesuffix(".gz")).suffix]
    # The cache is temporary, so that a changed file is never mistaken for an older one.
    with tempfile.TemporaryDirectory(prefix="pal_adapters_data_") as cache, quiet():
        try:
            if kind in (
                ",",
                "\t",
            ):  # `datasets` leaves these files open; "NA" and "None" are texts, not missing values
                read = as_dataset(pandas.read_csv(path, sep=kind, keep_default_na=False), str(path))
            else:
                read = datasets.load_dataset(
                    kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
                )
        except Exception as error:  # pyarrow, pandas, gzip and `datasets` have no common base class for errors
            cause = _cause(error)
            if cause == "StopIteration" or "no data" in cause or "at least one example" in cause:
                raise TaskDataError(f"{path}: no rows") from error
            hint = "; each row must be an object with columns" if kind == "json" else ""
            raise TaskDataError(f"{path}: cannot be read ({cause}){hint}") from error
    if len(read) == 0:
        raise TaskDataError(f"{path}: no rows")
    return read


def read_hub(benchmark: str, name: str) -> Mapping[str, datasets.Dataset]:
    """The splits of a benchmark task, from the Hub.

    Raises:
        TaskDataError: If the Hub cannot be reached or does not have them.
    """
    try:
        with quiet():
            return datasets.load_dataset(HUB[benchmark], name)
    except Exception as error:  # the network, the Hub and `datasets` have no common base class for errors
        raise TaskDataError(
            f"task {name!r}: cannot load {HUB[benchmark]} ({name}) from the Hub ({_first_line(error)}); "
            "set data_dir to read local files"
        ) from error


def _cause(error: BaseException) -> str:
    """The first line of the error that `datasets` wraps, which says what is wrong with the file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Turns off the progress bars of `datasets` inside the block, and restores them afterwards."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
