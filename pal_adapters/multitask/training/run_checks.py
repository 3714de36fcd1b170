"""Checks that the arguments of a run fit together, before anything is encoded or trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pal_adapters.errors import ConfigError, PalAdaptersError
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.sampling.selectors import BatchSelector, UncertaintySelector
from pal_adapters.multitask.sampling.strategies import Strategy, get_strategy, uncertainty_candidates

from .arguments import MultiTaskTrainingArguments
from .distributed import check_processes
from .evaluation import Aggregate
from .splits import require_by_task


class Recipe(Protocol):
    """A recipe that a run follows, such as a `Preset`."""

    def check(self, model: TaskHeads, arguments: MultiTaskTrainingArguments | None = None) -> None:
        """Warn if the model or the arguments differ from the recipe."""
        ...


class DivergedError(PalAdaptersError, ArithmeticError):
    """The loss is no longer a finite number."""


_UNUSED = ("data_collator", "compute_metrics", "model_init", "compute_loss_func", "preprocess_logits_for_metrics")


def check_run(
    model: TaskHeads,
    args: MultiTaskTrainingArguments,
    processing_class: Any,
    datasets: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    """Raises `ConfigError` for arguments of the wrong type, and for those that would have no effect.

    Args:
        model: The model.
        args: The arguments.
        processing_class: The tokenizer.
        datasets: `train_dataset` and `eval_dataset`, by name.
        given: Other arguments of `transformers.Trainer`.
    """
    if not isinstance(model, TaskHeads):
        raise ConfigError(f"model is a {type(model).__name__}: pass TaskHeads(model).")
    if not isinstance(args, MultiTaskTrainingArguments):
        raise ConfigError(f"args is a {type(args).__name__}: pass MultiTaskTrainingArguments.")
    for name in _UNUSED:
        if given.get(name) is not None:
            raise ConfigError(f"{name} has no effect here, where each Task says what it needs: leave it out.")
    if processing_class is None or getattr(processing_class, "pad_token_id", None) is None:
        raise ConfigError("processing_class needs to be a tokenizer with a padding token.")
    for name, rows in datasets.items():
        require_by_task(name, rows)
    _check_optimizers(args, given)


def check_ignore_keys(keys: Any, argument: str = "ignore_keys") -> None:
    """Raise `ConfigError` if output keys to ignore are given: evaluation reads only the logits of a task."""
    if keys is not None:
        raise ConfigError(f"{argument} has no effect here, where only the logits of a task are read: leave it out.")


def chosen_sampling(
    model: TaskHeads,
    args: MultiTaskTrainingArguments,
    strategy: Strategy | None,
    selector: BatchSelector | None,
    aggregate: Aggregate | None,
) -> tuple[Strategy, BatchSelector | None]:
    """The sampling strategy of a run, and the selector for `sampling="uncertainty"`.

    Raises:
        ConfigError: If two arguments conflict, or the processes cannot train the model.
    """
    chosen = strategy or get_strategy(args.sampling, temperature=args.sampling_temperature)
    if strategy is not None and args.sampling != "proportional":
        raise ConfigError(f"sampling={args.sampling!r} and strategy are both given: leave one of them out.")
    selects = chosen is uncertainty_candidates
    check_processes(args, model, mixed=args.mixed_batches or selects)
    if not selects and selector is not None:
        raise ConfigError("batch_selector has no effect without sampling='uncertainty': leave it out.")
    if selects and selector is None:
        selector = UncertaintySelector()
    if aggregate is not None and args.eval_aggregate != "mean":
        raise ConfigError(f"eval_aggregate={args.eval_aggregate!r} and aggregate are both given: leave one out.")
    return chosen, selector


def check_finite(loss: Tensor, tasks: Mapping[str, Any], args: MultiTaskTrainingArguments, step: int) -> None:
    """Raises `DivergedError` for a loss that is infinite or NaN, except in fp16, which skips such steps."""
    if not args.fp16 and not torch.isfinite(loss):
        raise DivergedError(
            f"task {' and '.join(map(repr, tasks))}: the loss is {loss.item()} in step {step}: lower learning_rate "
            f"(now {args.learning_rate:g})."
        )


def _check_optimizers(args: MultiTaskTrainingArguments, given: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for arguments that a given optimizer or schedule would silently override."""
    optimizer, scheduler = given.get("optimizers") or (None, None)
    if optimizer is not None and args.attention_learning_rate is not None:
        raise ConfigError("attention_learning_rate has no effect on a given optimizer: leave one of them out.")
    if not args.adam_bias_correction and (optimizer is not None or given.get("optimizer_cls_and_kwargs") is not None):
        raise ConfigError("adam_bias_correction=False has no effect on a given optimizer: leave one of them out.")
    if scheduler is not None and args.schedule == "pals":
        raise ConfigError("schedule='pals' has no effect with a given scheduler: leave one of them out.")
