"""What the command lines of the scripts share."""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Result = TypeVar("Result")


class InputError(Exception):
    """The user's input cannot be used; the message is one line."""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line; the standard parser prints the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser(doc: str | None) -> Parser:
    """A parser for the script with this docstring; its help shows the defaults."""
    return Parser(description=(doc or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def positive_int(text: str) -> int:
    return _number(text, int, "an integer of at least 1", lambda value: value >= 1)


def seed_int(text: str) -> int:
    return _number(text, int, "an integer from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def positive_float(text: str) -> float:
    return _number(text, float, "a number above 0", lambda value: 0 < value < float("inf"))


def _number(text: str, kind: Any, allowed: str, fits: Any) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {allowed}")
    return value


def make_folder(option: str, folder: str) -> Path:
    """Creates the folder that an option names."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {folder}: cannot be made ({error.strerror})") from error
    return path


def load_base(name: str | None, max_length: int | None = None) -> tuple[Any, Any]:
    """The base model and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from pal_adapters.multitask import default_model

    transformers_logging.disable_progress_bar()  # for loading weights; training has its own
    name = name or default_model()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModel.from_pretrained(name)
    except Exception as error:  # loading raises OSError, ValueError, KeyError and more, with long messages
        raise InputError(f"--model {name}: cannot be loaded ({first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no padding token")
    if base.config.is_encoder_decoder:
        raise InputError(f"--model {name}: encoder-decoder models are not supported; use an encoder or a decoder")
    longest = min(tokenizer.model_max_length, getattr(base.config, "max_position_embeddings", None) or 10**9)
    shortest = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if max_length is not None and not shortest <= max_length <= longest:
        raise InputError(f"--max_length {max_length}: allowed for this model: {shortest} to {longest}")
    return base, tokenizer


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "adapters", "peft", "datasets", "evaluate", "pal-adapters"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def named_once(option: str, names: Sequence[str]) -> None:
    """Raises an error if a task is named twice."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{option}: {name} is named twice")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file beside its place and moves it there, so that a killed run never leaves half of it."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table with a rule below its head; the first `left` columns are aligned to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if number < left else str.rjust for number in range(len(widths))]
    lines = ["  ".join(side(*cell) for side, *cell in zip(sides, row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def guarded(script: str, work: Callable[[], Result]) -> Result | None:
    """The result of `work`; after an error that the user can fix, prints it in one line and returns `None`."""
    # The host warns that no adapter is active while it activates the first one.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    try:
        from pal_adapters.errors import PalAdaptersError
    except ImportError as error:
        print(f"{script}: error: {error}; pip install 'pal-adapters[all]'", file=sys.stderr)
        return None
    try:
        return work()
    except ImportError as error:
        print(f"{script}: error: {error}; pip install 'pal-adapters[all]'", file=sys.stderr)
    except (InputError, PalAdaptersError) as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return None
