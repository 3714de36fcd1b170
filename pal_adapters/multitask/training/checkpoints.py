"""Checkpoints are complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from pal_adapters.errors import ConfigError, PalAdaptersError, StorageError
from pal_adapters.multitask.model.files import cause_of


class _UploadError(PalAdaptersError):
    """A checkpoint was written but could not be uploaded."""


@contextmanager
def complete_or_absent(directory: Path, writes: bool) -> Iterator[None]:
    """Within it a checkpoint is written; if that fails, the folder is as before.

    Args:
        directory: The folder of the checkpoint. If it exists, from another run, it is replaced.
        writes: Whether this process writes; in a distributed run only one does.

    Raises:
        StorageError: If a file cannot be written.
    """
    last = last_checkpoint(directory.parent)
    earlier = directory.with_name(f".{directory.name}.earlier")  # of another run in the same folder
    if writes and directory.is_dir():
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(directory, earlier)
    try:
        yield
    except _UploadError:  # the checkpoint is complete
        raise
    except BaseException as error:  # writers of files raise errors without a common base; also Ctrl-C
        if writes:
            shutil.rmtree(directory, ignore_errors=True)
            if earlier.is_dir():
                os.replace(earlier, directory)
        if not isinstance(error, Exception):
            raise
        raise StorageError(
            f"{directory} cannot be written ({cause_of(error)}). The last complete checkpoint is "
            f"{last or 'none'}; make room and resume from it."
        ) from error
    finally:
        if writes:
            shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def uploading(checkpoint: str) -> Iterator[None]:
    """Within it a complete checkpoint is uploaded, whose failure says that the checkpoint itself is complete."""
    try:
        yield
    except Exception as error:  # of the network, the Hub or the disk
        raise _UploadError(
            f"{checkpoint} cannot be uploaded ({cause_of(error)}). It is complete: resume from it."
        ) from error


def checkpoint_to_resume(output_dir: str) -> str:
    """The newest complete checkpoint in a folder.

    Raises:
        ConfigError: If there is none.
    """
    found = last_checkpoint(output_dir)
    if found is None:
        raise ConfigError(f"{output_dir} has no complete checkpoint to resume from: start without one.")
    return found


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint in a folder, or `None`: where to resume from after a crash."""
    folder = Path(output_dir)
    if not folder.is_dir() or get_last_checkpoint(str(folder)) is None:
        return None
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # it is written last
        except (OSError, ValueError):
            continue
        return str(path)
    return None
