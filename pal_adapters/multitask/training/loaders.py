"""Rows of many tasks: which are trained and evaluated on, and the batches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.sampling.strategies import MultiTaskBatchSampler, Strategy
from pal_adapters.multitask.tasks.collate import MultiTaskCollator
from pal_adapters.multitask.tasks.encoding import ConcatTasks, EncodedTask
from pal_adapters.multitask.tasks.task import Task

from .arguments import MultiTaskTrainingArguments

Rows = Any
"""Rows of a task: a `datasets.Dataset`, or an `EncodedTask`."""


class Loaders(Trainer):
    """A Trainer with the rows of many tasks."""

    args: MultiTaskTrainingArguments
    tasks: dict[str, Task]
    strategy: Strategy
    collator: MultiTaskCollator
    _encode: Callable[..., EncodedTask]
    _sampler: MultiTaskBatchSampler | None

    @staticmethod
    def _encoded(
        task: Task, rows: Rows, where: str, *, tokenizer: Any, max_length: int, needs_labels: bool = True
    ) -> EncodedTask:
        if not isinstance(rows, EncodedTask):
            return EncodedTask(task, rows, tokenizer, max_length, where=where, needs_labels=needs_labels)
        if needs_labels and not rows.has_labels:
            raise ConfigError(f"task {task.name!r}, {where}: the rows have no labels; they can only be predicted.")
        return rows

    @staticmethod
    def _train_rows(task: Task, given: Mapping[str, Rows] | None) -> Rows:
        if given is not None and task.name in given:
            return given[task.name]
        if task.train_split not in task.dataset:
            there = ", ".join(task.dataset) or "none"
            raise ConfigError(f"task {task.name!r} has no split {task.train_split!r} to train on; it has: {there}.")
        return task.dataset[task.train_split]

    def _evaluation_rows(
        self, given: Mapping[str, Rows] | None, *, needed: bool, name_of: str = "eval_dataset"
    ) -> dict[str, EncodedTask]:
        found: dict[str, EncodedTask] = {}
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(
                f"{name_of} is of type {type(given).__name__}: pass a dict with the rows of each task, such as "
                f"{{{next(iter(self.tasks))!r}: rows}}."
            )
        if given is not None:
            for name, rows in given.items():
                task = rows.task if isinstance(rows, EncodedTask) else self.tasks.get(name)
                if task is None or task.name not in self.tasks:
                    raise ConfigError(f"{name_of} has {name!r}, which is no task: {', '.join(self.tasks)}.")
                where = f"{name_of}[{name!r}]"
                found[name] = self._encode(task, rows, where, needs_labels=name_of != "test_dataset")
            return found
        for name, task in self.tasks.items():
            splits = task.validation()
            if needed and not splits:
                raise ConfigError(
                    f"task {name!r} has no split {task.validation_splits[0]!r} to evaluate on: give it one, or pass "
                    "eval_dataset={...} with the tasks to evaluate, or eval_strategy='no'."
                )
            for key, rows in splits.items():
                if key in found:
                    raise ConfigError(f"two evaluation sets are called {key!r}: give task {name!r} another name.")
                found[key] = self._encode(task, rows, f"evaluation set {key}")
        return found

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of `MultiTaskBatchSampler`."""
        args, world = self.args, self.args.world_size
        dataset = cast("ConcatTasks", self.train_dataset)
        options: dict[str, Any] = {
            "strategy": self.strategy,
            "mixed": args.mixed_batches,
            "group_size": args.gradient_accumulation_steps * world,
            "seed": args.data_seed if args.data_seed is not None else args.seed,
        }
        sizes = {rows.task.name: len(rows) for rows in dataset.tasks}
        if args.group_by_length:
            options["lengths"] = {rows.task.name: rows.lengths() for rows in dataset.tasks}
        batch_size = self._train_batch_size
        steps = args.steps_per_epoch or MultiTaskBatchSampler(sizes, batch_size, **options).steps_per_epoch
        epochs = -(-args.max_steps // steps) if args.max_steps > 0 else int(np.ceil(args.num_train_epochs))
        self._sampler = MultiTaskBatchSampler(
            sizes, batch_size, **options, steps_per_epoch=steps, epochs=max(1, epochs)
        )
        loader = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            collate_fn=self.collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            # Workers are seeded with it; the global one is the model's alone, so that a resumed run draws the same.
            generator=torch.Generator().manual_seed(args.seed),
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Rows of one task in their order."""
        sets = cast("Mapping[str, EncodedTask]", self.eval_dataset)
        rows = sets[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        loader = DataLoader(
            rows,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        return self.accelerator.prepare(loader)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Rows of one task in their order."""
        return self.get_eval_dataloader(test_dataset)
