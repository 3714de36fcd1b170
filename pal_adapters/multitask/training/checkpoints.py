"""Checkpoints have the format of `TaskHeads`: complete or absent, restored in place and uploaded as they are.

For that, `MultiTaskTrainer` relies on internals of `transformers.Trainer`, 4.57 and 5:

| upstream symbol                         | what and why                                                             |
|-----------------------------------------|--------------------------------------------------------------------------|
| `Trainer._save`                         | overridden: the folder has the format of `TaskHeads`                     |
| `Trainer._save_checkpoint`              | extended: an incomplete checkpoint is removed                            |
| `Trainer._save_optimizer_and_scheduler` | overridden for FSDP                                                      |
| `Trainer._load_optimizer_and_scheduler` | overridden for FSDP; extended: errors name the files                     |
| `Trainer._load_rng_state`               | extended: errors name the file                                           |
| `Trainer._load_from_checkpoint`         | overridden: values are copied in place                                   |
| `Trainer._load_best_model`              | overridden: values are copied in place                                   |
| `Trainer._push_from_checkpoint`         | extended: the host uploads `output_dir`, to which it copies files with   |
|                                         | names it knows, and these have other names                               |
| `Trainer.push_in_progress`              | read: no file may change while the host uploads                          |

`test_upstream_of_checkpoints` in `tests/multitask/training/test_trainer_features.py` fails if one of them changes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from pal_adapters.checks import path
from pal_adapters.errors import ConfigError, PalAdaptersError, StorageError
from pal_adapters.multitask.model.files import cause_of


class _UploadError(PalAdaptersError):
    """A checkpoint was written but could not be uploaded."""


@contextmanager
def complete_or_absent(directory: Path, writes: bool) -> Iterator[None]:
    """A context in which a checkpoint is written; if that fails, the folder is left as it was before.

    Args:
        directory: The folder of the checkpoint. If another run left one there, it is replaced.
        writes: Whether this process writes; in a distributed run only one does.

    Raises:
        StorageError: If a file cannot be written.
    """
    last = last_checkpoint(directory.parent)
    earlier = directory.with_name(f".{directory.name}.earlier")  # left by another run in the same folder
    if writes and directory.is_dir():
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(directory, earlier)
    try:
        yield
    except _UploadError:  # the checkpoint is complete
        raise
    except BaseException as error:  # file writers raise errors without a common base class; Ctrl-C counts too
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
    """A context in which a complete checkpoint is uploaded; its error says that the checkpoint itself is complete."""
    try:
        yield
    except Exception as error:  # from the network, the Hub or the disk
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
    path()("output_dir", output_dir)
    folder = Path(output_dir)
    if not folder.is_dir() or get_last_checkpoint(str(folder)) is None:
        return None
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for place in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))  # it is written last
        except (OSError, ValueError):
            continue
        return str(place)
    return None
