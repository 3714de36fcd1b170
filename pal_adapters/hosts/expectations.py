"""Checks of what the package relies on in its hosts, with an error that names what an installed host has changed.

Each binding lists its expectations in its own file.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pkgutil import resolve_name

from packaging.version import Version

from pal_adapters.errors import MissingHostError, UntestedVersionWarning

TESTED = {"adapters": ("1.3.0", "1.3"), "peft": ("0.21.0", "0.21"), "transformers": ("4.57.0", "5.24")}
"""Oldest and newest version of each library that the tests run with; the newest includes its patch releases."""

_warned: set[str] = set()


@dataclass(frozen=True)
class Touch:
    """A part of a host that the package relies on or replaces, beyond its public interface.

    Attributes:
        symbol: its name upstream.
        reason: why the package uses or replaces it.
        holds: whether the installed host still has it in the expected form; must be cheap, as it runs on import.
    """

    symbol: str
    reason: str
    holds: Callable[[], bool]


def takes(path: str, *parameters: str) -> Callable[[], bool]:
    """A check that a function such as `"peft:PeftModel.load_adapter"` has parameters of these names, among others."""
    return lambda: set(parameters) <= set(inspect.signature(resolve_name(path)).parameters)


def has(path: str, *names: str) -> Callable[[], bool]:
    """A check that an object such as `"peft:PeftModel"` exists and has attributes of these names."""
    return lambda: resolve_name(path) is not None and all(hasattr(resolve_name(path), name) for name in names)


def check_touches(library: str, touches: Iterable[Touch]) -> None:
    """Raise `MissingHostError` if a library is too old, or for the first expectation it does not meet."""
    oldest = TESTED[library][0]
    if Version(version(library)) < Version(oldest):
        raise MissingHostError(f"{library} {version(library)} is not supported: install '{library}>={oldest}'.")
    for touch in touches:
        try:
            holds = touch.holds()
        except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError):  # the symbol is gone
            holds = False
        if not holds:
            raise MissingHostError(
                f"{library} {version(library)} has changed {touch.symbol}, on which pal_adapters relies "
                f"({touch.reason}). Tested versions are {tested(library)}: install one of them."
            )


def tested(library: str) -> str:
    """The tested versions of a library, for messages."""
    oldest, newest = TESTED[library]
    return f"{oldest} to {newest}.x"


def warn_untested(*libraries: str) -> None:
    """Warn once, with `UntestedVersionWarning`, about a library that is newer than the tested versions."""
    for library in libraries:
        installed = Version(version(library))
        if installed.release[:2] > Version(TESTED[library][1]).release[:2] and library not in _warned:
            _warned.add(library)
            warnings.warn(
                f"pal_adapters was tested with {library} {tested(library)}, not with {installed}, which is newer.",
                UntestedVersionWarning,
                stacklevel=2,
            )
