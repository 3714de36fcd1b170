"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StorageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, in a folder of its own, whose files are moved to `path` and beside it when the body ends.

    A reader, or a process that is killed, finds the old file or the new one; after an error, the old one.

    Raises:
        StorageError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
            yield Path(folder, path.name)
            for written in sorted(Path(folder).iterdir(), key=lambda one: one.name == path.name):
                os.replace(written, path.with_name(written.name))
    except Exception as error:  # a full disk is an OSError, a RuntimeError or another error, by the writer
        raise StorageError(f"{path} cannot be written ({error}). It is as it was before.") from error
