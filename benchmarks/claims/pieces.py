"""Pieces: runs that are done once, each with a JSON file that holds its settings and its result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pal_adapters.cli.shared import first_line, write_json
from pal_adapters.errors import ConfigError

Result = dict[str, Any]


def key_of(settings: Mapping[str, Any]) -> str:
    """The same for equal settings, whatever their order, and different for others."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Pieces:
    """The pieces in a folder.

    Args:
        folder: Where their files are.
        budget: Seconds after which no further piece is started.
        clock: Tells the time in seconds.
    """

    def __init__(self, folder: Path, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self._clock = clock
        self._end = clock() + budget

    def path(self, settings: Mapping[str, Any]) -> Path:
        return self.folder / f"{settings['recipe']}-{'-'.join(settings['tasks'])}-{key_of(settings)}.json"

    def find(self, settings: Mapping[str, Any]) -> Result | None:
        """The result of a piece that is done."""
        path = self.path(settings)
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known, result = found["settings"], found["result"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}: cannot be read as a piece ({first_line(error)}); remove it") from error
        if known != settings:
            raise ConfigError(f"{path} was made with other settings than its name says; remove it")
        return dict(result)

    def get(self, settings: Mapping[str, Any], run: Callable[[], Result]) -> Result | None:
        """The result of a piece, which `run` computes if it is not done; `None` if the budget is spent."""
        found = self.find(settings)
        if found is not None or self._clock() >= self._end:
            return found
        began = self._clock()
        result = run() | {"seconds": round(self._clock() - began, 1)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path(settings), {"settings": dict(settings), "result": result})
        print(f"{self.path(settings).stem}: {result['seconds']:.0f} s", flush=True)
        return json.loads(json.dumps(result))  # as it will be read again
