"""The data loaders of a run: batches of many tasks to train on, and the examples of one task to evaluate on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pal_adapters.multitask.model.heads import count_items
from pal_adapters.multitask.sampling.strategies import MultiTaskBatchSampler, Strategy
from pal_adapters.multitask.tasks.collate import Batch, MultiTaskCollator
from pal_adapters.multitask.tasks.encoding import ConcatTasks

from .arguments import MultiTaskTrainingArguments


def train_sampler(
    args: MultiTaskTrainingArguments, dataset: ConcatTasks, strategy: Strategy, batch_size: int
) -> MultiTaskBatchSampler:
    """The sampler of a run, with the length and the number of its epochs."""
    options: dict[str, Any] = {
        "strategy": strategy,
        "mixed": args.mixed_batches,
        "group_size": args.gradient_accumulation_steps * args.world_size,
        "seed": args.data_seed if args.data_seed is not None else args.seed,
    }
    sizes = {rows.task.name: len(rows) for rows in dataset.tasks}
    if args.group_by_length:
        options["lengths"] = {rows.task.name: rows.lengths() for rows in dataset.tasks}
    steps = args.steps_per_epoch or MultiTaskBatchSampler(sizes, batch_size, **options).steps_per_epoch
    epochs = -(-args.max_steps // steps) if args.max_steps > 0 else int(np.ceil(args.num_train_epochs))
    return MultiTaskBatchSampler(sizes, batch_size, **options, steps_per_epoch=steps, epochs=max(1, epochs))


def train_loader(
    args: MultiTaskTrainingArguments, dataset: ConcatTasks, sampler: MultiTaskBatchSampler, collator: MultiTaskCollator
) -> DataLoader[Any]:
    """The batches of a sampler."""
    return DataLoader(dataset, batch_sampler=sampler, **_options(args, collator))


def evaluation_loader(
    args: MultiTaskTrainingArguments, dataset: Dataset[Any], collator: MultiTaskCollator
) -> DataLoader[Any]:
    """The examples of one task, in their order."""
    return DataLoader(dataset, batch_size=args.eval_batch_size, **_options(args, collator))


def item_counts(batches: Iterable[Batch], collator: MultiTaskCollator) -> Tensor:
    """For each task, the number of items that its loss in these batches is averaged over `[t]`."""
    counts = torch.zeros(len(collator.heads))
    for batch in batches:
        for task, labels in batch["labels"].items():
            counts[collator.numbers[task]] += count_items(collator.heads[task].kind, labels).cpu()
    return counts


def _options(args: MultiTaskTrainingArguments, collator: MultiTaskCollator) -> dict[str, Any]:
    options: dict[str, Any] = {
        "collate_fn": collator,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        # Seeds the workers. The global generator is left to the model, so that a resumed run draws the same numbers.
        "generator": torch.Generator().manual_seed(args.seed),
    }
    for name in ("in_order", "multiprocessing_context"):  # only in transformers 5
        if hasattr(args, f"dataloader_{name}"):
            options[name] = getattr(args, f"dataloader_{name}")
    return options


def new_probabilities(sampler: MultiTaskBatchSampler, history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The probabilities of the tasks in the current epoch as log entries, unless they are already logged."""
    if any(entry.get("sampling_epoch") == sampler.epoch + 1 for entry in history):
        return {}
    shares = zip(sampler.names, sampler.probabilities().tolist(), strict=True)
    return {"sampling_epoch": sampler.epoch + 1} | {f"sampling_{name}": share for name, share in shares}


def drawn(sampler: MultiTaskBatchSampler, steps: int) -> list[int]:
    """How often each task was drawn in the first steps of a run."""
    counts = np.zeros(len(sampler.sizes), dtype=np.int64)
    left, epoch = steps, 0
    while left:
        draws = sampler.draws(epoch)[:left]
        counts += np.bincount(draws.ravel(), minlength=len(counts))
        left, epoch = left - len(draws), epoch + 1
    return counts.tolist()
