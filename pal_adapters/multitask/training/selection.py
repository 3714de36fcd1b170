"""Scores the candidates of a batch and keeps those to train on (`sampling="uncertainty"`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.sampling.selectors import BatchSelector, Candidates
from pal_adapters.multitask.tasks.collate import Batch, MultiTaskCollator


class CandidateSelection:
    """Runs the model on all candidates, lets a `BatchSelector` choose, and counts what was chosen.

    Args:
        selector: The selector.
        collator: The collator of the batches.
        tasks: Names of the tasks in the order of their task IDs.
    """

    def __init__(self, selector: BatchSelector, collator: MultiTaskCollator, tasks: Sequence[str]) -> None:
        self.selector = selector
        self.collator = collator
        self.tasks = tuple(tasks)
        self._counts: Tensor | None = None  # [t + 1]: chosen examples of each task, then all candidates

    def choose(
        self,
        model: TaskHeads,
        batch: Batch,
        *,
        size: int,
        place: Sequence[int],
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> Batch:
        """The examples of a batch to train on.

        Args:
            model: The model.
            batch: The candidates.
            size: How many to choose.
            place: Numbers that identify the batch in the run; they seed the dropout.
            device: Device of the model.
            context: Returns the context of a forward pass, such as autocast.
        """
        model.train(getattr(self.selector, "mode", "train") == "train")
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        # Each batch has its own generator state: on resuming, the host restores the generators only after this pass.
        seed = int(np.random.SeedSequence(tuple(place)).generate_state(1)[0])
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), context():
            torch.manual_seed(seed)
            logits = model(**inputs).logits
        model.train()
        examples = self.collator.examples(batch)
        rows: dict[str, list[int]] = {}
        for number, (task, _) in enumerate(examples):
            rows.setdefault(task, []).append(number)
        numbers = self.collator.numbers
        chosen = self.selector.select(
            Candidates(
                tasks=self.tasks,
                task_ids=[numbers[task] for task, _ in examples],
                logits=logits,
                rows=rows,
                num_select=size,
                batch=batch,
            )
        )
        kept = [numbers[examples[int(row)][0]] for row in chosen]
        counts = torch.tensor(
            [*(kept.count(number) for number in range(len(self.tasks))), len(examples)], device=device
        )
        self._counts = counts if self._counts is None else self._counts + counts
        return self.collator.take(batch, [int(row) for row in chosen])

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`chosen_<task>` and `candidates` since the last call; `reduce` sums over processes."""
        if self._counts is None:
            return {}
        *chosen, candidates = reduce(self._counts.float()).tolist()
        self._counts = None
        return {f"chosen_{task}": count for task, count in zip(self.tasks, chosen, strict=True)} | {
            "candidates": candidates
        }
