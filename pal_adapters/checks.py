"""What a configuration value may be. Every rejection names the argument, the value and what is allowed.

A dataclass field carries its check in its metadata, `field(default=6, metadata=option("Heads.", integer(1)))`;
`check_fields` applies them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from .errors import ConfigError

LARGEST = 100_000
"""The default upper bound of sizes and counts: beyond any model, and small enough to fail at once."""


@dataclass(frozen=True)
class Check:
    """What one argument accepts.

    Attributes:
        allowed: completes "use ...".
        accepts: whether a value is allowed; it must not raise for any value.
    """

    allowed: str
    accepts: Callable[[Any], bool]

    def __call__(self, argument: str, value: object) -> None:
        """Raise `ConfigError` unless `value` is allowed."""
        if not self.accepts(value):
            raise ConfigError(f"{argument}={shown(value)} is not allowed: use {self.allowed}.")


def shown(value: object) -> str:
    """`repr(value)`, shortened if it is long."""
    try:
        text = repr(value)
    except Exception:  # a `repr` may raise anything; that of an integer with thousands of digits raises ValueError
        return f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:197]}..."


MODEL = Check("a loaded model, such as AutoModel.from_pretrained(...)", lambda value: isinstance(value, nn.Module))


def boolean() -> Check:
    """True or False."""
    return Check("True or False", lambda value: isinstance(value, bool))


def integer(minimum: int, maximum: int | None = LARGEST) -> Check:
    """An integer within bounds (None: without an upper one); not a bool."""

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        return value >= minimum and (maximum is None or value <= maximum)

    return Check(f"an integer of at least {minimum}" + ("" if maximum is None else f", at most {maximum}"), accepts)


def number(minimum: float = 0.0, maximum: float = 1e6, *, above: bool = False, below: bool = False) -> Check:
    """A finite number within bounds; not a bool.

    Args:
        minimum: the lower bound.
        maximum: the upper bound.
        above: exclude the lower bound.
        below: exclude the upper bound.
    """

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        low = value > minimum if above else value >= minimum
        return low and (value < maximum if below else value <= maximum)  # NaN is on neither side

    lower = f"above {minimum:g}" if above else f"of at least {minimum:g}"
    upper = f"below {maximum:g}" if below else f"at most {maximum:g}"
    positive = "positive " if above and minimum == 0 else ""
    return Check(f"a {positive}number {lower}, {upper}", accepts)


def probability() -> Check:
    """A number `p` with `0 <= p < 1`."""
    return Check("a probability p with 0 <= p < 1", number(0, 1, below=True).accepts)


def one_of(*allowed: object) -> Check:
    """One of a few strings (or other plain values), which a value of another type never equals."""
    kinds = tuple({type(value) for value in allowed})
    return Check(
        f"one of {', '.join(repr(value) for value in allowed)}",
        lambda value: isinstance(value, kinds) and value in allowed and (bool in kinds or not isinstance(value, bool)),
    )


def string(*, empty: bool = True) -> Check:
    """A string; `empty` says whether `""` is allowed."""
    return Check("a string", lambda value: isinstance(value, str) and (empty or bool(value)))


def path() -> Check:
    """The path of a file or folder."""
    return Check("a path", lambda value: isinstance(value, (str, os.PathLike)) and bool(str(value)))


def list_of(item: Check, noun: str, *, different: bool = False, minimum: int = 0, maximum: int = LARGEST) -> Check:
    """A list or tuple of allowed items.

    Args:
        item: what each item accepts.
        noun: what the items are, as in "a list of <noun>".
        different: whether an item may occur only once.
        minimum: the shortest list.
        maximum: the longest list.
    """

    def accepts(value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or not minimum <= len(value) <= maximum:
            return False
        if not all(map(item.accepts, value)):
            return False
        return not different or len(set(value)) == len(value)

    return Check(f"a list of {'different ' if different else ''}{noun}", accepts)


def mapping_of(item: Check, noun: str) -> Check:
    """A mapping from names to allowed values."""

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and all(isinstance(key, str) for key in value)
            and all(map(item.accepts, value.values()))
        )

    return Check(f"a dict of {noun} by name", accepts)


def optional(check: Check) -> Check:
    """None, or what `check` accepts."""
    return Check(f"{check.allowed}, or None", lambda value: value is None or check.accepts(value))


def either(*checks: Check) -> Check:
    """What one of several checks accepts."""
    return Check(", or ".join(check.allowed for check in checks), lambda value: any(c.accepts(value) for c in checks))


def option(help: str, check: Check) -> dict[str, Any]:
    """Metadata of a dataclass field: its help and its check."""
    return {"help": help, "check": check}


def check_of(config_class: type, name: str) -> Check | None:
    """The check of a field; a subclass that only changes a default keeps the check of its base class."""
    for cls in config_class.__mro__:
        field = cls.__dict__.get("__dataclass_fields__", {}).get(name)
        if field is not None and "check" in field.metadata:
            return field.metadata["check"]
    return getattr(config_class, "inherited_checks", {}).get(name)


def check_fields(config: Any) -> None:
    """Apply the checks of all fields of a dataclass.

    The checks of fields inherited from a library's class are in the class attribute `inherited_checks`.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """
    for field in fields(config):
        check = check_of(type(config), field.name)
        if check is not None:
            check(field.name, getattr(config, field.name))


# For values that are not dataclass fields


def require_one_of(argument: str, value: object, allowed: Iterable[object]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    one_of(*allowed)(argument, value)


def require_bool(argument: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is True or False."""
    boolean()(argument, value)


def require_int(argument: str, value: object, *, minimum: int, maximum: int | None = None) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `minimum`."""
    integer(minimum, maximum)(argument, value)


def require_probability(argument: str, value: object) -> None:
    """Raise `ConfigError` unless `0 <= value < 1`."""
    probability()(argument, value)


def require_multiple(argument: str, value: int, divisor: str, number: int) -> None:
    """Raise `ConfigError` unless `number` divides `value`; both are positive.

    Args:
        argument: the name of `value`.
        value: the number to be divided.
        divisor: the name of `number`.
        number: the divisor.
    """
    if value % number:
        above = (value // number + 1) * number
        near = f"{above - number} or {above}" if value > number else f"{above}"
        raise ConfigError(
            f"{argument}={value} is not allowed with {divisor}={number}: it must be a multiple of {divisor}, such as "
            f"{near}."
        )
