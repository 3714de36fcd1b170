"""What the command lines of the scripts have in common."""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Result = TypeVar("Result")


class InputError(Exception):
    """What the user asked for cannot be done; the message is one line."""


class Parser(argparse.ArgumentParser):
    """Ends with one line, where the standard parser prints the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser(doc: str | None) -> Parser:
    """A parser for a script with this docstring, whose help shows the defaults."""
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
    """The folder that an option names."""
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

    transformers_logging.disable_progress_bar()  # of weights; the bar of the training stays
    name = name or default_model()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModel.from_pretrained(name)
    except Exception as error:  # hosts raise OSError, ValueError, KeyError and more, with many lines
        raise InputError(f"--model {name}: cannot be loaded ({first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no padding token")
    if base.config.is_encoder_decoder:
        raise InputError(f"--model {name}: it has an encoder and a decoder; use a model with one of them")
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


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def guarded(script: str, work: Callable[[], Result]) -> Result | None:
    """What the work gives; `None` after an error that is the user's to mend, which is told in one line."""
    # This host warns that no adapter is active while it activates the first one.
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
