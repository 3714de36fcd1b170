"""What the bindings rely on in their hosts, and errors that name what an installed host has changed.

Each binding lists its expectations in an `expectations.py` of its own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pkgutil import resolve_name
from typing import NamedTuple

from packaging.version import Version

from pal_adapters.errors import MissingHostError, UntestedVersionWarning

TESTED = {"adapters": ("1.3.0", "1.3"), "peft": ("0.21.0", "0.21"), "transformers": ("4.57.0", "5.24")}
"""Oldest and newest version of each library that the tests run with; the newest includes its patch releases."""

_warned: set[str] = set()


class Touch(NamedTuple):
    """A part of a host that the package relies on or replaces, beyond its public interface.

    Checking it must be cheap, as it is done on import.

    Attributes:
        path: where it is, such as `"peft:PeftModel.load_adapter"`.
        names: what it must have; None if it only has to exist. For a class, attributes or fields. For a function, its
            parameters: exactly these, the first ones if `"..."` follows, some of them if `"..."` stands in front.
        reason: why the package uses or replaces it.
        source: a word that must be part of its source; `""` for none.
    """

    path: str
    names: tuple[str, ...] | None
    reason: str
    source: str = ""

    @property
    def symbol(self) -> str:
        """Its name, without the module."""
        name = self.path.rpartition(":")[2]
        return f"{name} ({self.source})" if self.source else name

    def fault(self) -> str | None:
        """How the installed host differs from what is expected, or None."""
        try:
            found = resolve_name(self.path)
        except (AttributeError, ImportError):
            return f"{self.symbol} does not exist"
        if self.source and self.source not in inspect.getsource(found):
            return f"{self.symbol} has changed"
        if self.names is None:
            return None
        if inspect.isclass(found):
            fields = getattr(found, "__dataclass_fields__", ())
            lost = [name for name in self.names if name not in fields and not hasattr(found, name)]
            return f"{self.symbol} has no {', '.join(lost)}" if lost else None
        given, names = tuple(inspect.signature(found).parameters), self.names
        if names[0] == "...":
            same = set(names[1:]) <= set(given)
        else:
            same = given[: len(names) - 1] == names[:-1] if names[-1] == "..." else given == names
        return None if same else f"{self.symbol} takes ({', '.join(given)}), not ({', '.join(names)})"


def check_host(library: str, touches: Iterable[Touch]) -> None:
    """Raise `MissingHostError` if a library is too old, or does not meet what is expected of it."""
    installed, (oldest, newest) = version(library), TESTED[library]
    if Version(installed) < Version(oldest):
        raise MissingHostError(f"{library} {installed} is not supported: install '{library}>={oldest}'.")
    faults = [f"{fault} (needed: {touch.reason})" for touch in touches if (fault := touch.fault()) is not None]
    if faults:
        raise MissingHostError(
            f"{library} {installed} does not work with this version of pal_adapters: {'; '.join(faults)}. Install a "
            f"tested version, {oldest} to {newest}.x, or a newer pal_adapters."
        )


def warn_untested(*libraries: str) -> None:
    """Warn once, with `UntestedVersionWarning`, about a library that is newer than the tested versions."""
    for library in libraries:
        installed, (oldest, newest) = Version(version(library)), TESTED[library]
        if installed.release[:2] > Version(newest).release[:2] and library not in _warned:
            _warned.add(library)
            warnings.warn(
                f"pal_adapters was tested with {library} {oldest} to {newest}.x, but {installed} is installed.",
                UntestedVersionWarning,
                stacklevel=2,
            )
