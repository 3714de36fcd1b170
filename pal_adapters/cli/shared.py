"""What the commands and the examples share: tasks, base models, folders, files and tables."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import tabulate
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import Task, TaskDataError, default_model
from pal_adapters.multitask.model.description import DESCRIPTION_FILE
from pal_adapters.multitask.model.files import replace_text
from pal_adapters.multitask.model.heads import TOKEN_KINDS, Pooling
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.multitask.model.tasks_file import package_versions

POOLINGS: dict[str, Pooling] = {"mean": "mean", "cls": "first"}


def load_tasks(option: str, names: Sequence[str], data_dir: str | None, pooling: Pooling = "mean") -> list[Task]:
    """The tasks of these names, each once.

    Args:
        option: The option that names them, for errors.
        names: Names of GLUE and SuperGLUE tasks, or folders with a `task.yaml`, possibly in `data_dir`.
        data_dir: Folder with the data; `None` for the Hub.
        pooling: How heads pool the tokens, unless a task says so itself or its head reads every token.
    """
    tasks = [_load_task(name, data_dir) for name in names]
    pooled = [task for task in tasks if task.kind not in TOKEN_KINDS]
    if pooling != "mean" and not pooled:
        raise ConfigError(f"--pooling has no effect on {', '.join(names)}, whose heads read every token")
    for task in pooled:
        task.pooling = pooling if task.pooling == "mean" else task.pooling
    found = [task.name for task in tasks]
    for name in found:
        if found.count(name) > 1:
            raise ConfigError(f"{option}: {name} is named twice")
    return tasks


def _load_task(name: str, data_dir: str | None) -> Task:
    for folder in (Path(name), Path(data_dir or "", name)):
        if (folder / "task.yaml").is_file():
            return Task.from_folder(folder)
    try:
        return Task.named(name, data_dir)
    except TaskDataError:
        if Path(name).is_dir():
            return Task.from_folder(name)  # its error says what the folder lacks
        raise


def described(task: Task, max_length: int, result: Mapping[str, Any]) -> TaskDescription:
    """What a `Predictor` needs to know about a trained task, with its score on the first split that was scored."""
    score = next(iter(result["metrics"].values()))[result["primary_metric"]]
    return task.describe(max_length=max_length, score=score if isfinite(score) else None)


def load_base(name: str | None, max_length: int | None = None) -> tuple[Any, Any]:
    """The base model and its tokenizer."""
    transformers_logging.disable_progress_bar()  # for loading weights; training has its own
    name = name or default_model()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        base = AutoModel.from_pretrained(name)
    except Exception as error:  # loading raises OSError, ValueError, KeyError and more, with long messages
        raise ConfigError(f"--model {name}: cannot be loaded ({first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"--model {name}: its tokenizer has no padding token")
    if base.config.is_encoder_decoder:
        raise ConfigError(f"--model {name}: encoder-decoder models are not supported; use an encoder or a decoder")
    longest = min(tokenizer.model_max_length, getattr(base.config, "max_position_embeddings", None) or 10**9)
    shortest = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if max_length is not None and not shortest <= max_length <= longest:
        raise ConfigError(f"--max_length {max_length}: allowed for this model: {shortest} to {longest}")
    return base, tokenizer


def make_folder(option: str, folder: str) -> Path:
    """Creates the folder that an option names."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {folder}: cannot be made ({error.strerror})") from error
    return path


def model_folder(folder: str) -> str:
    """The folder of a `TaskHeads`: the given one, or the part of it where `train` and `transfer` put it.

    Anything that is not a folder may be a Hub repo ID.
    """
    path = Path(folder)
    if not path.is_dir():
        return folder
    for found in (path, path / "adapters", path / "model"):
        if (found / DESCRIPTION_FILE).is_file():
            return str(found)
    raise ConfigError(
        f"{folder} has no {DESCRIPTION_FILE}: pass a folder that `pal-adapters train` or TaskHeads wrote"
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **package_versions("datasets", "evaluate")}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file in one step."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table of texts; the first `left` columns are aligned to the left, others to the right."""
    sides = ["left" if number < left else "right" for number in range(len(head))]
    return tabulate.tabulate(rows, head, tablefmt="simple", colalign=sides, disable_numparse=True)


def first_line(error: BaseException) -> str:
    """The first line of a message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
