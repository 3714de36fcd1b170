"""Exceptions of the package: one base, each also a builtin, so that callers may catch either."""

from __future__ import annotations


class PalAdaptersError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(PalAdaptersError, ValueError):
    """A configuration value is not allowed; the message names the argument, the value and what is allowed."""


class SiteError(PalAdaptersError, ValueError):
    """The places where a method attaches were not found in a model; the message says what to pass."""


class UnknownAdapterError(PalAdaptersError, ValueError):
    """An adapter name is not on the model; the message lists the names that are."""


class UnsupportedError(PalAdaptersError, ValueError):
    """The request makes no sense for this method or host; the message gives the reason."""


class StorageError(PalAdaptersError, OSError):
    """Files are missing or damaged, cannot be written, or do not fit the model; the message names the folder."""


class MissingHostError(PalAdaptersError, ImportError):
    """A name of a host library was used while that library is not installed; the message says what to install."""


class UntestedVersionWarning(UserWarning):
    """A host library is newer than the versions that this package was tested with."""


def how_to_install(*extras: str) -> str:
    """What an error tells users to run for packages that are missing. Change it with the first release on PyPI.

    Args:
        *extras: Extras of this package that contain what is missing; one of them suffices.
    """
    return "in a clone of this package's repository: " + " or ".join(f"pip install -e '.[{name}]'" for name in extras)
