"""Exceptions of the package: one base, each also a builtin, so that callers may catch either."""

from __future__ import annotations

from collections.abc import Iterable


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


class MissingHostError(PalAdaptersError, ImportError):
    """A name of a host library was used while that library is not installed; the message says what to install."""


def require_one_of(argument: str, value: object, allowed: Iterable[object]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed or isinstance(value, bool) is not isinstance(allowed[0], bool):
        names = ", ".join(repr(a) for a in allowed)
        raise ConfigError(f"{argument}={value!r} is not allowed: use one of {names}.")


def require_bool(argument: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{argument}={value!r} is not allowed: use True or False.")


def require_int(argument: str, value: object, *, minimum: int) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{argument}={value!r} is not allowed: use an integer of at least {minimum}.")


def require_probability(argument: str, value: object) -> None:
    """Raise `ConfigError` unless `0 <= value < 1`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{argument}={value!r} is not allowed: use a probability, 0 <= {argument} < 1.")


def require_heads(hidden_size: int, num_heads: int) -> None:
    """Raise `ConfigError` unless `num_heads` divides `hidden_size`."""
    if hidden_size % num_heads:
        near = [d for d in range(hidden_size, 0, -1) if d % num_heads == 0][:1]
        below = near[0] if near else num_heads
        raise ConfigError(
            f"hidden_size={hidden_size} is not allowed with num_heads={num_heads}: the width must be a multiple of "
            f"the number of heads, such as {below or num_heads} or {(hidden_size // num_heads + 1) * num_heads}."
        )
