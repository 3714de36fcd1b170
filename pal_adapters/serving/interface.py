"""What the service needs of a predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class HasDict(Protocol):
    """A task's description, or a prediction."""

    def to_dict(self) -> dict[str, Any]:
        """Its content as JSON values."""
        ...


class PredictorLike(Protocol):
    """Answers requests for several tasks, such as `pal_adapters.multitask.Predictor`."""

    @property
    def tasks(self) -> Mapping[str, HasDict]:
        """The tasks by name."""
        ...

    def __call__(self, requests: Sequence[Mapping[str, Any]], /) -> Sequence[HasDict]:
        """The predictions, in the order of the requests."""
        ...

    def check(self, request: Mapping[str, Any], /) -> Any:
        """Raise `RequestError` for an unknown task or unusable columns."""
        ...

    def add_task(self, name: str, folder: Path, /) -> Any:
        """Load one more task."""
        ...

    def remove_task(self, name: str, /) -> Any:
        """Remove a task."""
        ...
