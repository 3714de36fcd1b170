"""Finds the folder of a `TaskHeads`: on disk, or in a repository of the Hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from pal_adapters.checks import path
from pal_adapters.errors import ConfigError, StorageError

from .files import cause_of


def fetch(name: str | Path, *, revision: str | None, token: str | bool | None) -> Path:
    """A local folder as it is; otherwise a Hub repo ID, whose files are downloaded.

    Raises:
        ConfigError: If `revision` or `token` is given for a local folder.
        StorageError: If `name` is neither, or the repository cannot be read.
    """
    path()("directory", name)
    if Path(name).is_dir():
        for argument, value in (("revision", revision), ("token", token)):
            if value is not None:
                raise ConfigError(f"{argument} has no effect for the folder {name}: leave it out.")
        return Path(name)
    repo = name.as_posix() if isinstance(name, Path) else name
    try:
        fetched = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            token=token,
            ignore_patterns=["last-checkpoint/*", "checkpoint-*/*"],  # what the Trainer resumes from
        )
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{repo} is neither a folder nor a repository that can be read from the Hub ({cause_of(error)}). Pass a "
            "folder that save_pretrained wrote, or 'owner/name'; private repositories need a token."
        ) from error
    return Path(fetched)
