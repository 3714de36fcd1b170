"""The examples of a piece: all or a few per class to train on, some held out of the training set, and the scored."""

from __future__ import annotations

from typing import Any

import numpy as np

from pal_adapters.cli.fitting import Data, held_out
from pal_adapters.errors import ConfigError
from pal_adapters.multitask import EncodedTask


def few(rows: Any, label_column: str, shots: int, seed: int) -> Any:
    """`shots` examples of each class, drawn with a seed."""
    labels = np.asarray(rows[label_column])
    if not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"--shots {shots}: the labels are numbers without classes; name other --targets")
    draw = np.random.default_rng(seed)
    chosen = [draw.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return rows.select(sorted(np.concatenate(chosen).tolist()))


def prepare(task: Any, tokenizer: Any, settings: dict[str, Any], *, scored: bool) -> Data:
    """Holds out a tenth of the training examples, always the same; without `scored` they are the scored ones, too."""
    train, dev = held_out(task, task.dataset[task.train_split], 42)
    dev = limited(dev, settings["dev_rows"])
    if settings["shots"] is not None:
        train = few(train, task.label_column, settings["shots"], settings["seed"])
    train = limited(train, settings["train_rows"])
    test = limited(task.dataset[task.validation_splits[0]], settings["test_rows"]) if scored else dev
    parts = {"training": train, "held out": dev, "validation": test}
    encoded = {
        where: EncodedTask(task, rows, tokenizer, settings["max_length"], where=where) for where, rows in parts.items()
    }
    return Data(task, encoded["training"], encoded["held out"], {task.name: encoded["validation"]})


def limited(rows: Any, most: int | None) -> Any:
    """At most so many examples, always the same."""
    if most is None or len(rows) <= most:
        return rows
    return rows.shuffle(seed=42, keep_in_memory=True).select(range(most))
