"""Command-line options as dataclasses, read by the `HfArgumentParser` of transformers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from transformers import HfArgumentParser

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # exists for type checkers alone

Options = TypeVar("Options", bound="DataclassInstance")


class Parser(HfArgumentParser):
    """Reports an error in one line; the standard parser prints the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def option(help: str, default: Any = ..., **more: Any) -> Any:
    """A dataclass field that becomes an option.

    Args:
        help: Its help text.
        default: Its default; without one it is required, and `None` means optional.
        **more: `aliases`, and arguments of `ArgumentParser.add_argument`.
    """
    metadata = {"help": help, **more}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(
    command: str, doc: str | None, argv: Sequence[str] | None, options: type[Options], **positional: str
) -> tuple[Options, argparse.Namespace]:
    """Reads the command line.

    Args:
        command: The command, for its help and errors.
        doc: Its description: the first paragraph is shown.
        argv: The arguments.
        options: A dataclass.
        **positional: Help of the arguments without a name.

    Returns:
        The options, and the arguments without a name.
    """
    of: Any = options  # the parser asks for a type of its own
    parser: Any = Parser(of, prog=command, description=(doc or "").split("\n\n")[0])
    for name, help in positional.items():
        parser.add_argument(name, help=help)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    found = parser.parse_args(argv)
    return options(**{one.name: getattr(found, one.name) for one in fields(options)}), found


def fill_in(options: Any, **defaults: Any) -> None:
    """Fills in the options that were left at `None`."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


class PositiveInt(int):
    """An integer of at least 1."""

    def __new__(cls, text: str) -> PositiveInt:
        return super().__new__(cls, _number(text, int, "an integer of at least 1", lambda value: value >= 1))


class Seed(int):
    """A seed of numpy."""

    def __new__(cls, text: str) -> Seed:
        allowed = "an integer from 0 to 4294967295"
        return super().__new__(cls, _number(text, int, allowed, lambda value: 0 <= value < 2**32))


class PositiveFloat(float):
    """A finite number above 0."""

    def __new__(cls, text: str) -> PositiveFloat:
        return super().__new__(cls, _number(text, float, "a number above 0", lambda value: 0 < value < float("inf")))


def _number(text: str, kind: Any, allowed: str, fits: Any) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {allowed}")
    return value
