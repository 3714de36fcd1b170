"""Whether a checkpoint can be resumed by a run: it is complete, and the run would go on with the same batches."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import TrainerState

from pal_adapters.errors import ConfigError, StorageError
from pal_adapters.multitask.model.description import read_description
from pal_adapters.multitask.model.files import cause_of, read_json, replace_text
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.sampling.strategies import STRATEGIES, MultiTaskBatchSampler, Strategy, Temperature

STATE_FILE = "trainer_state.json"
SAMPLING_FILE = "sampling.json"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_STATE: dict[str, Callable[[Any], bool]] = {
    "global_step": _is_int,
    "epoch": _or_none(_is_number),
    "num_input_tokens_seen": _is_number,
    "log_history": lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
    "best_metric": _or_none(_is_number),
    "best_global_step": _or_none(_is_int),
    "best_model_checkpoint": _or_none(lambda value: isinstance(value, str)),
    "train_batch_size": _or_none(lambda value: _is_int(value) and value > 0),
    "stateful_callbacks": _or_none(lambda value: isinstance(value, dict)),
}
"""What a resumed run reads of `trainer_state.json`; the rest follows from its arguments."""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of the run that wrote a checkpoint.

    Raises:
        StorageError: If the file is missing or damaged.
    """
    path = checkpoint / STATE_FILE
    state = read_json(path)
    if "global_step" not in state:
        raise StorageError(f"{path} is damaged: it has no global_step: resume from another checkpoint.")
    unknown = sorted(set(state) - {field.name for field in fields(TrainerState)})
    if unknown:
        raise StorageError(
            f"{path} has {unknown[0]!r:.60}, which this version of transformers does not know: resume with the "
            "version that wrote it."
        )
    for name, good in _STATE.items():
        if name in state and not good(state[name]):
            raise StorageError(f"{path} is damaged: {name}={state[name]!r:.60}: resume from another checkpoint.")
    return state


def check_files(checkpoint: Path, *, generators: str, exactly: bool) -> None:
    """Raise `StorageError` unless the states of optimizer, schedule and generators are there and whole.

    Args:
        checkpoint: The folder.
        generators: Name of the file with the generators of this process.
        exactly: Whether the run needs the generators.
    """
    for name in ("optimizer.pt", "scheduler.pt", *([generators] if exactly else [])):
        path = checkpoint / name
        if not path.is_file():
            raise StorageError(
                f"{path} is not there: the checkpoint is incomplete, was written with save_only_model=True or by "
                "another number of processes, and cannot be resumed exactly: resume from another one, or start a new "
                "run with TaskHeads.from_pretrained."
            )
        if not zipfile.is_zipfile(path):  # its table of contents is at the end
            raise StorageError(f"{path} is damaged: resume from another checkpoint.")


@contextmanager
def reading_states(checkpoint: str | None, names: str) -> Iterator[None]:
    """Turns any error of torch or of the host, which have no common base, into one that names the files."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(
            f"{checkpoint}: {names} cannot be loaded into this run ({cause_of(error)}): resume from another one."
        ) from error


def check_heads(checkpoint: Path, model: TaskHeads) -> None:
    """Raise `ConfigError` unless a checkpoint holds the same tasks as a model, in the same order, with like heads."""
    description = read_description(checkpoint)
    if tuple(description.tasks) != model.tasks:
        raise ConfigError(
            f"{checkpoint} has the tasks {', '.join(description.tasks)}, the model {', '.join(model.tasks)}: resume "
            "with the same tasks in the same order."
        )
    for task, route in description.tasks.items():
        there, here = asdict(description.heads[route["head"]]), asdict(model.head(task).config)
        for name in ("kind", "num_labels", "num_choices", "pooling"):
            if there[name] != here[name]:
                raise ConfigError(
                    f"{checkpoint}: task {task!r} has {name}={there[name]!r} there and {here[name]!r} on the model: "
                    "resume with the same tasks."
                )


def _name_of(strategy: Strategy) -> str:
    """The name of a strategy in `STRATEGIES`, or what identifies one with arguments or of one's own."""
    for name, known in STRATEGIES.items():
        if strategy is known:
            return name
    if isinstance(strategy, Temperature):
        return f"temperature {strategy.temperature:g}"
    return getattr(strategy, "__qualname__", type(strategy).__qualname__)


def sampling_of(sampler: MultiTaskBatchSampler, strategy: Strategy) -> dict[str, Any]:
    """All that the sequence of batches depends on, apart from the data.

    Args:
        sampler: The sampler of the run.
        strategy: How its tasks are drawn.
    """
    changes = (sampler.probabilities(0) != sampler.probabilities(sampler.epochs - 1)).any()
    return {
        "tasks": dict(zip(sampler.names, sampler.sizes, strict=True)),
        "strategy": _name_of(strategy),
        "mixed_batches": sampler.mixed,
        "group_by_length": sampler.groups_by_length,
        "batch_size": sampler.rows,
        "batches_per_step": sampler.group_size,
        "steps_per_epoch": sampler.steps_per_epoch,
        "epochs": sampler.epochs if changes else None,
        "seed": sampler.seed,
    }


def write_sampling(sampling: Mapping[str, Any], directory: Path) -> None:
    """Writes `sampling.json`."""
    replace_text(directory / SAMPLING_FILE, json.dumps(sampling, indent=2, ensure_ascii=False) + "\n")


def check_sampling(checkpoint: Path, sampling: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless a run draws the batches that the checkpoint's run would have drawn next.

    Checkpoints of earlier releases do not say, and are taken as they are.
    """
    path = checkpoint / SAMPLING_FILE
    if not path.exists():
        return
    there = read_json(path)
    if set(there) != set(sampling) or not isinstance(there["tasks"], dict):
        raise StorageError(f"{path} is damaged: it needs {', '.join(sampling)}: resume from another checkpoint.")
    for name, value in sampling.items():
        same = type(there[name]) is type(value) and there[name] == value
        if not same or (name == "tasks" and list(there[name]) != list(value)):
            raise ConfigError(
                f"{path}: the checkpoint has {name}={there[name]!r:.200}, this run {value!r:.200}, so it cannot go on "
                "with the same batches: resume with the same, or with ignore_data_skip=True to go on with other "
                "batches."
            )
