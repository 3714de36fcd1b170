"""Checks that the arguments of a run fit together, before anything is encoded or trained."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Trainer

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


_OF_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
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
    own = optimizer is not None or given.get("optimizer_cls_and_kwargs") is not None
    if args.optim_args and own:
        raise ConfigError("optim_args has no effect on a given optimizer: leave one of them out.")
    if args.optim_args and not own:
        _check_optim_args(args)
    if optimizer is not None and args.attention_learning_rate is not None:
        raise ConfigError("attention_learning_rate has no effect on a given optimizer: leave one of them out.")
    if not args.adam_bias_correction and own:
        raise ConfigError("adam_bias_correction=False has no effect on a given optimizer: leave one of them out.")
    if scheduler is not None and args.schedule == "pals":
        raise ConfigError("schedule='pals' has no effect with a given scheduler: leave one of them out.")


def _check_optim_args(args: MultiTaskTrainingArguments) -> None:
    """Raise `ConfigError` for an entry of `optim_args` that torch's own optimizers do not get."""
    optim = getattr(args.optim, "value", args.optim)
    if optim not in _OF_TORCH:
        return  # creating others needs the model, or packages that may be missing: the host says so
    entries = str(args.optim_args).replace(" ", "").split(",")
    without = copy.copy(args)
    for entry in entries:
        without.optim_args = ",".join(other for other in entries if other != entry)
        if Trainer.get_optimizer_cls_and_kwargs(args) == Trainer.get_optimizer_cls_and_kwargs(without):
            raise ConfigError(f"optim_args with {entry!r} has no effect for optim={optim!r}: leave it out.")


def check_optimizer_holds(optimizer: Any, model: TaskHeads, added: Collection[str]) -> None:
    """Raise `ConfigError` if a given optimizer lacks the head of a task that the trainer has added to the model."""
    held = {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}
    for task in added:
        if not all(id(parameter) in held for parameter in model.head(task).parameters()):
            raise ConfigError(
                f"the given optimizer does not train the head of task {task!r}, which the model lacked: call "
                "model.add(task.name, task.head_config()) for each task before you create the optimizer."
            )
