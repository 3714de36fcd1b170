"""Pads examples of any tasks into one batch, and takes examples out of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pal_adapters.checks import Check, require_int, shown
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.model.heads import IGNORED, HeadConfig

Batch = dict[str, Any]

_HEADS = Check(
    "a dict with the HeadConfig of each task",
    lambda value: isinstance(value, Mapping) and all(isinstance(head, HeadConfig) for head in value.values()),
)


class MultiTaskCollator:
    """Collates examples of many tasks, as `EncodedTask` returns them, into one batch.

    Inputs are padded to the longest in the batch, `[r, n]`. `task_ids` is a list with the task ID of each of the `r`
    encoder inputs. `labels` has one tensor for each task in the batch, with its own dtype, so regression labels stay
    floats beside class numbers; examples to predict may have none. The choices of an example are adjacent.

    Args:
        tokenizer: Defines the padding token and side.
        heads: The head of each task, in the order of the task IDs.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    def __init__(self, tokenizer: Any, heads: dict[str, HeadConfig], *, pad_to_multiple_of: int | None = None) -> None:
        if not hasattr(tokenizer, "padding_side") or getattr(tokenizer, "pad_token_id", None) is None:
            raise ConfigError(f"tokenizer={shown(tokenizer)} is not allowed: use a tokenizer with a padding token.")
        _HEADS("heads", heads)
        if pad_to_multiple_of is not None:
            require_int("pad_to_multiple_of", pad_to_multiple_of, minimum=1)
        self.tokenizer = tokenizer
        self.heads = heads
        self.numbers = {name: number for number, name in enumerate(heads)}
        self.multiple = pad_to_multiple_of or 1
        self.left = tokenizer.padding_side == "left"
        spans = [name for name, head in heads.items() if head.kind == "span_qa"]
        if spans and self.left:  # padding would shift the token positions that are the labels
            raise ConfigError(
                f"task {spans[0]!r} is span_qa, which needs a tokenizer that pads on the right: set "
                "padding_side='right'."
            )
        self._pads = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
        }

    def __call__(self, features: Sequence[dict[str, Any]]) -> Batch:
        """The batch of these examples."""
        if not isinstance(features, Sequence) or not features or not all(isinstance(f, Mapping) for f in features):
            raise ConfigError(f"features={shown(features)} is not allowed: use a list of items of an EncodedTask.")
        inputs = [row for feature in features for row in feature["inputs"]]
        longest = max(len(row["input_ids"]) for row in inputs)
        longest = -(-longest // self.multiple) * self.multiple
        batch: Batch = {
            name: torch.from_numpy(self._pad([row[name] for row in inputs], longest, self._pads.get(name, 0)))
            for name in inputs[0]
        }
        batch["task_ids"] = [self.numbers[feature["task"]] for feature in features for _ in feature["inputs"]]
        labels: dict[str, list[Any]] = {}
        for feature in features:
            if feature["label"] is not None:
                labels.setdefault(feature["task"], []).append(feature["label"])
        if labels:
            batch["labels"] = {t: self._labels(self.heads[t], values, longest) for t, values in labels.items()}
        return batch

    def _labels(self, head: HeadConfig, values: list[Any], longest: int) -> Tensor:
        if head.kind in ("token_tagging", "language_modeling"):
            return torch.from_numpy(self._pad(values, longest, IGNORED))
        return torch.from_numpy(np.asarray(values))

    def _pad(self, rows: Sequence[np.ndarray], longest: int, value: int) -> np.ndarray:
        padded = np.full((len(rows), longest), value, dtype=np.int64)
        for number, row in enumerate(rows):
            if self.left:
                padded[number, longest - len(row) :] = row
            else:
                padded[number, : len(row)] = row
        return padded

    def examples(self, batch: Batch) -> list[tuple[str, list[int]]]:
        """The examples of a batch in order: the task of each, and the numbers of its encoder inputs."""
        names = list(self.heads)
        found: list[tuple[str, list[int]]] = []
        at = 0
        while at < len(batch["task_ids"]):
            task = names[batch["task_ids"][at]]
            choices = self.heads[task].num_choices
            found.append((task, list(range(at, at + choices))))
            at += choices
        return found

    def take(self, batch: Batch, rows: Sequence[int]) -> Batch:
        """A batch of the given examples of a batch, in the given order."""
        examples = self.examples(batch)
        inputs = [number for row in rows for number in examples[row][1]]
        at = torch.tensor(inputs)
        taken: Batch = {n: t.index_select(0, at.to(t.device)) for n, t in batch.items() if isinstance(t, Tensor)}
        taken["task_ids"] = [batch["task_ids"][number] for number in inputs]
        within: dict[str, int] = {}
        place = []
        for task, _ in examples:  # index of each example among those of its task
            place.append(within.get(task, 0))
            within[task] = place[-1] + 1
        chosen: dict[str, list[int]] = {}
        for row in rows:
            chosen.setdefault(examples[row][0], []).append(place[row])
        taken["labels"] = {
            task: batch["labels"][task].index_select(0, torch.tensor(numbers).to(batch["labels"][task].device))
            for task, numbers in chosen.items()
        }
        return taken
