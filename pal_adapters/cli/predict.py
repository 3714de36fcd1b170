"""Answers requests with a trained folder: one text for some of its tasks, or a file with a request in each line.

    pal-adapters predict out --text "a fine film" --tasks sentiment acceptability
    pal-adapters predict out --input requests.jsonl --output predictions.jsonl

A line is a JSON object with the name of a task and the columns of its texts: {"task": "rte", "sentence1": "...",
"sentence2": "..."}. Prints a JSON object per request, in their order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import Predictor, RequestError
from pal_adapters.multitask.model.files import replace_text

from .options import PositiveInt, option, parse
from .shared import model_folder


@dataclass
class PredictOptions:
    """The options of `predict`."""

    text: str | None = option("a text to predict", None)
    tasks: list[str] = option("tasks for --text (default: all tasks that read one text)", [])
    input: str | None = option("file with a request per line, as JSON; - for the standard input", None)
    output: str | None = option("file for the predictions (default: the standard output)", None)
    device: str | None = option("where to run the model, such as cuda:0", None)
    max_tokens_per_batch: PositiveInt = option("tokens of a batch, with padding", 4096)

    def __post_init__(self) -> None:
        if (self.text is None) is (self.input is None):
            raise ConfigError("pass either --text or --input")
        if self.tasks and self.text is None:
            raise ConfigError("--tasks has no effect with --input, whose lines name their tasks; leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    args, given = parse(
        "pal-adapters predict", __doc__, argv, PredictOptions, folder="a trained folder, or a Hub repo ID"
    )
    requests, lines = ([], []) if args.input is None else _read(args.input)
    predictor = Predictor.from_pretrained(
        model_folder(given.folder), device=args.device, max_tokens_per_batch=args.max_tokens_per_batch
    )
    if args.text is not None:
        tasks = args.tasks or [name for name, task in predictor.tasks.items() if len(task.text_columns) == 1]
        if not tasks:
            raise ConfigError("--text fits no task of this folder, which all read several columns; use --input")
        found = predictor(args.text, task=tasks)
    else:
        try:
            found = predictor(requests)
        except RequestError as error:
            where = f" (task {error.task!r})" if error.task is not None else ""
            raise ConfigError(f"{args.input}, line {lines[error.index]}{where}: {error.reason}") from error
    text = "".join(json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in found)
    if args.output is None:
        sys.stdout.write(text)
    else:
        replace_text(Path(args.output), text)
    return 0


def _read(file: str) -> tuple[list[Any], list[int]]:
    """The requests, and the number of the line of each."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--input {file}: cannot be read ({error})") from error
    requests, lines = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            requests.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number}: not JSON ({error})") from error
        lines.append(number)
    if not requests:
        raise ConfigError(f"--input {file}: there are no requests")
    return requests, lines
