"""What the package relies on in its hosts, and what it says when an installed host is different.

Each binding lists its expectations in a file of its own; this one only knows how to check them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from pal_adapters.errors import MissingHostError, UntestedVersionWarning

TESTED = {"adapters": ("1.3.0", "1.3"), "peft": ("0.21.0", "0.21"), "transformers": ("4.57.0", "5.24")}
"""Oldest and newest version of each library that the tests run with; the newest includes its patch releases."""

_warned: set[str] = set()


@dataclass(frozen=True)
class Touch:
    """One thing in a host that is not public, or that is replaced, and that the package relies on.

    Attributes:
        symbol: its name upstream.
        reason: what it is used or replaced for.
        holds: whether the installed host still has it in the expected form; must be cheap, as it runs on import.
    """

    symbol: str
    reason: str
    holds: Callable[[], bool]


def takes(owner: Any, name: str, *parameters: str) -> Callable[[], bool]:
    """A check that a function exists and takes parameters of these names; it may take more."""
    return lambda: set(parameters) <= set(inspect.signature(getattr(owner, name)).parameters)


def has(owner: Any, *names: str) -> Callable[[], bool]:
    """A check that an object has attributes of these names."""
    return lambda: all(hasattr(owner, name) for name in names)


def check_touches(library: str, touches: Iterable[Touch]) -> None:
    """Raise `MissingHostError` for a library that is too old, or for the first expectation that it does not meet."""
    oldest = TESTED[library][0]
    if Version(version(library)) < Version(oldest):
        raise MissingHostError(f"{library} {version(library)} is not supported: install '{library}>={oldest}'.")
    for touch in touches:
        try:
            holds = touch.holds()
        except (AttributeError, ImportError, LookupError, TypeError, ValueError):  # what it looks at is gone
            holds = False
        if not holds:
            raise MissingHostError(
                f"{library} {version(library)} has changed {touch.symbol}, on which pal_adapters relies "
                f"({touch.reason}). Tested versions are {tested(library)}: install one of them."
            )


def tested(library: str) -> str:
    """The tested versions of a library, to be read."""
    oldest, newest = TESTED[library]
    return f"{oldest} to {newest}.x"


def warn_untested(*libraries: str) -> None:
    """Warn once, by `UntestedVersionWarning`, of a library that is newer than the tests have seen."""
    for library in libraries:
        installed = Version(version(library))
        if installed.release[:2] > Version(TESTED[library][1]).release[:2] and library not in _warned:
            _warned.add(library)
            warnings.warn(
                f"pal_adapters was tested with {library} {tested(library)}, not with {installed}, which is newer.",
                UntestedVersionWarning,
                stacklevel=2,
            )
