"""`transformers.Trainer` for many tasks on one model; its checkpoints are those of `checkpointing.py`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PredictionOutput

from pal_adapters.checks import path, shown
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.sampling.selectors import BatchSelector, UncertaintySelector
from pal_adapters.multitask.sampling.strategies import MultiTaskBatchSampler, Strategy
from pal_adapters.multitask.tasks.collate import Batch, MultiTaskCollator
from pal_adapters.multitask.tasks.encoding import ConcatTasks, EncodedTask
from pal_adapters.multitask.tasks.task import Task, check_tasks

from .arguments import MultiTaskTrainingArguments
from .callbacks import Progress, Steps
from .checkpointing import CheckpointingTrainer
from .checkpoints import checkpoint_to_resume
from .environment import environment
from .evaluation import Aggregate, collected, example_outputs, speed, summarised, values_kept
from .loaders import drawn, evaluation_loader, item_counts, new_probabilities, train_loader, train_sampler
from .model_card import write_model_card
from .optim import give_attention_its_rate, pals_schedule, uncorrected
from .resuming import sampling_of
from .run_checks import Recipe, check_finite, check_ignore_keys, check_optimizer_holds, check_run, chosen_sampling
from .selection import CandidateSelection
from .splits import Rows, check_score_names, encoded, evaluation_sets, sets_to_evaluate, training_sets
from .task_losses import TaskLosses
from .task_setup import add_heads, warn_of_resting_adapters


class MultiTaskTrainer(CheckpointingTrainer):
    """A `transformers.Trainer` that draws batches of many tasks and otherwise works as usual.

    * The loss of a step is that of `TaskHeads` over all examples of the step, whatever the gradient accumulation and
      the number of processes.
    * `loss_<task>` is logged beside `loss`, and the probabilities of the tasks once per epoch. With
      `sampling="uncertainty"`, `chosen_<task>` counts the examples of each task that were trained on since the last
      log entry, and `candidates` all that were scored.
    * The bias of a new regression head, if it is still 0, starts at the mean of the labels.
    * Evaluation returns `eval_<task>_<metric>`, `eval_<task>_loss` and `eval_average`, the `eval_aggregate` of the
      primary scores of all tasks, negated where lower is better. `eval_<task>_loss` is the
      mean over all items of the task, whatever the batch size and the number of processes: a custom loss is computed
      once, over all examples. `eval_loss` is the mean over the evaluation sets.
    * A checkpoint holds the adapters, the heads and, if it is trained, the base model; it can also be read with
      `TaskHeads.from_pretrained`. A killed run that is restarted with
      `train(resume_from_checkpoint=last_checkpoint(output_dir))` continues with the same batches and losses.
    * In a distributed run, all processes train the same task in a step, unless batches are mixed. Parameters of tasks
      that are absent from a step get no gradient and are not updated.

    Args:
        model: `TaskHeads`. Missing heads are added.
        args: The arguments.
        tasks: The tasks, with their data.
        train_dataset: Examples to train on by task, instead of the task's training split.
        eval_dataset: Examples to evaluate on by task, instead of the tasks' validation splits. Other tasks are not
            evaluated.
        processing_class: The tokenizer.
        strategy: A custom strategy, see `sampling.Strategy`, instead of `args.sampling`.
        batch_selector: Chooses the examples of `sampling="uncertainty"`; by default `UncertaintySelector`.
        aggregate: Computes `eval_average` from the primary scores by task, instead of `args.eval_aggregate`.
        preset: The recipe that the run follows; warns where the model or the arguments differ from it.
        **kwargs: Other arguments of `transformers.Trainer`.

    Raises:
        ConfigError: For arguments that do not fit together, before anything is trained.
        TaskDataError: For examples that do not fit their task.
        DivergedError: From `train`, if the loss becomes infinite or NaN, except in fp16, which skips such steps.
    """

    args: MultiTaskTrainingArguments
    tasks: dict[str, Task]

    def __init__(
        self,
        model: TaskHeads,
        args: MultiTaskTrainingArguments,
        tasks: Iterable[Task] | None = None,
        *,
        train_dataset: Mapping[str, Rows] | None = None,
        eval_dataset: Mapping[str, Rows] | None = None,
        processing_class: Any = None,
        strategy: Strategy | None = None,
        batch_selector: BatchSelector | None = None,
        aggregate: Aggregate | None = None,
        preset: Recipe | None = None,
        **kwargs: Any,
    ) -> None:
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        check_run(model, args, processing_class, datasets, kwargs)
        self.tasks = check_tasks(tasks or ())
        self.strategy, batch_selector = chosen_sampling(model, args, strategy, batch_selector, aggregate)
        self.aggregate = aggregate
        if isinstance(batch_selector, UncertaintySelector):
            batch_selector.check(self.tasks.values())
        if preset is not None:
            preset.check(model, args)
        self.preset = preset
        self._encode = partial(encoded, tokenizer=processing_class, max_length=args.max_length)
        training = training_sets(self.tasks, train_dataset, self._encode)
        needed = str(args.eval_strategy) not in ("no", "IntervalStrategy.NO")
        evaluating = evaluation_sets(self.tasks, eval_dataset, self._encode, needed=needed)
        check_score_names(evaluating, args.metric_for_best_model)
        added = [name for name in self.tasks if name not in model.tasks]
        add_heads(model, self.tasks, training)
        if (kwargs.get("optimizers") or (None,))[0] is not None:
            check_optimizer_holds(kwargs["optimizers"][0], model, added)
        heads = {task: model.head(task).config for task in model.tasks}
        self.collator = MultiTaskCollator(
            processing_class, heads, pad_to_multiple_of=8 if args.fp16 or (args.bf16 and not args.use_cpu) else None
        )
        self._losses = TaskLosses(model.tasks)
        self._selection = (
            None if batch_selector is None else CandidateSelection(batch_selector, self.collator, model.tasks)
        )
        self._sampler: MultiTaskBatchSampler | None = None
        if not args.adam_bias_correction:
            kwargs["optimizer_cls_and_kwargs"] = uncorrected(args)
        super().__init__(
            model=cast("Any", model),
            args=args,
            data_collator=self.collator,
            train_dataset=ConcatTasks(list(training.values())),
            eval_dataset=cast("Any", evaluating),
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_fsdp_enabled:
            # It would cast all inputs and outputs of the model, labels and counts included. Autocast does not.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.model_accepts_loss_kwargs = True  # the loss is over the whole step
        self.label_names = ["labels"]
        self.add_callback(Steps(self._current_sampler))
        for callback in list(self.callback_handler.callbacks):
            if type(callback) is ProgressCallback:
                self.remove_callback(callback)
                self.add_callback(Progress())

    def create_accelerator_and_postprocess(self) -> None:
        """Creates the accelerator with what the arguments of this run say."""
        with environment(self.args._environment):
            super().create_accelerator_and_postprocess()

    def _current_sampler(self) -> MultiTaskBatchSampler:
        assert self._sampler is not None
        return self._sampler

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: each trial needs a model of its own."""
        raise ConfigError(
            "hyperparameter_search is not supported, since each trial needs new adapters and heads: write a loop that "
            "makes a model and a MultiTaskTrainer for each trial."
        )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trains, with a warning for frozen adapters. `True` resumes from the last complete checkpoint."""
        if trial is not None:
            self.hyperparameter_search()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint_to_resume(cast("str", self.args.output_dir))
        check_ignore_keys(ignore_keys_for_eval, "ignore_keys_for_eval")
        if resume_from_checkpoint:
            path()("resume_from_checkpoint", resume_from_checkpoint)
            self._check_checkpoint(resume_from_checkpoint)
        warn_of_resting_adapters(self._task_heads(), self.tasks)
        return super().train(resume_from_checkpoint, **kwargs)

    def _new_sampler(self, batch_size: int) -> MultiTaskBatchSampler:
        return train_sampler(self.args, cast("ConcatTasks", self.train_dataset), self.strategy, batch_size)

    def _sampling(self, batch_size: int | None = None) -> dict[str, Any]:
        sampler = self._current_sampler() if batch_size is None else self._new_sampler(batch_size)
        return sampling_of(sampler, self.strategy)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of a `MultiTaskBatchSampler`."""
        dataset = cast("ConcatTasks", self.train_dataset)
        self._sampler = self._new_sampler(self._train_batch_size)
        return self.accelerator.prepare(train_loader(self.args, dataset, self._sampler, self.collator))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The examples of one task, in their order."""
        sets = cast("Mapping[str, EncodedTask]", self.eval_dataset)
        rows = sets.get(eval_dataset) if isinstance(eval_dataset, str) else eval_dataset
        if not isinstance(rows, (EncodedTask, Subset)):
            raise ConfigError(
                f"eval_dataset={shown(eval_dataset)} is not allowed: pass the name of an evaluation set "
                f"({', '.join(sets) or 'there are none'}) or an EncodedTask; a batch of an evaluation has one task."
            )
        return self.accelerator.prepare(evaluation_loader(self.args, rows, self.collator))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The examples of one task, in their order."""
        return self.get_eval_dataloader(test_dataset)

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        """The batches of one step, and for each task the number of items that its loss is averaged over `[t]`."""
        drawn_batches = enumerate(islice(epoch_iterator, num_batches))
        batches = [self._selected(batch, number) for number, batch in drawn_batches]
        return batches, self._sum(item_counts(batches, self.collator).to(device))

    def _prepare_input(self, data: Any) -> Any:
        # The host casts all floats to the dtype of DeepSpeed's config, which would round regression labels.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _selected(self, batch: Batch, number: int) -> Batch:
        """The examples of batch `number` of a step to train on."""
        if self._selection is None:
            return batch
        return self._selection.choose(
            self._task_heads(),
            cast("Batch", self._prepare_inputs(batch)),
            size=self._train_batch_size,
            place=(self.args.seed, self.state.global_step, self.args.process_index, number),
            device=self.args.device,
            context=self.compute_loss_context_manager,
        )

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Loss and gradients of a batch."""
        self.scored = None  # the weights change
        loss = super().training_step(model, inputs, *args, **kwargs)
        check_finite(loss, inputs["labels"], self.args, self.state.global_step + 1)
        return loss

    def draws(self) -> dict[str, int]:
        """How often each task was drawn so far: in steps, or in examples if batches are mixed.

        Under `sampling="uncertainty"` tasks are not drawn; see `chosen_<task>` in the log.
        """
        counts = [0] * len(self.tasks) if self._sampler is None else drawn(self._sampler, self.state.global_step)
        return dict(zip(self.tasks, counts, strict=True))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, as its share of the loss of the whole step."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
            self._losses.add(outputs.task_losses, outputs.task_counts)
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self) -> Any:
        """The context of a forward pass, with autocast under FSDP too."""
        stack = super().compute_loss_context_manager()
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if self.is_fsdp_enabled and half is not None:
            stack.enter_context(torch.autocast(self.args.device.type, half))
        return stack

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The optimizer, with separate parameter groups for what trains at `attention_learning_rate`."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args)
        if created and self.args.attention_learning_rate is not None:
            give_attention_its_rate(optimizer, self._task_heads(), self.args.attention_learning_rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the arguments, or the one of PALs."""
        if self.lr_scheduler is None and self.args.schedule == "pals":
            warmup = self.args.get_warmup_steps(num_training_steps)
            factor = partial(pals_schedule, warmup_steps=warmup, steps=num_training_steps)
            self.lr_scheduler = LambdaLR(cast("Any", optimizer or self.optimizer), factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: adapters and heads differ from example to example."""
        return 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores of all tasks, on the given examples or on those of the trainer.

        Args:
            eval_dataset: Examples to evaluate on by task, or the name of an evaluation set.
            ignore_keys: Not supported: leave it out.
            metric_key_prefix: Prefix of the names of the scores.
        """
        check_ignore_keys(ignore_keys)
        self._memory_tracker.start()
        own = cast("Mapping[str, EncodedTask]", self.eval_dataset)
        sets = sets_to_evaluate(self.tasks, own, eval_dataset, self._encode)
        start = time.time()
        scored = {key: self._run(rows, f"{metric_key_prefix}_{key}")[2:] for key, rows in sets.items()}
        metrics = summarised(metric_key_prefix, sets, scored, self.aggregate or self.args.eval_aggregate)
        metrics |= speed(metric_key_prefix, start, self._examples_a_step(), *sets.values())
        self.log(metrics)
        if eval_dataset is None and metric_key_prefix == "eval":
            self.scored = metrics
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _examples_a_step(self) -> int:
        return self.args.eval_batch_size * self.args.world_size

    def _run(self, rows: EncodedTask, prefix: str) -> tuple[Any, Any, float | None, dict[str, float]]:
        """Logits, labels, mean loss and scores of the examples of one task; loss and scores only with labels."""
        order = np.argsort(-rows.lengths(), kind="stable")  # batches of similar lengths need less padding
        loader = self.get_eval_dataloader(Subset(rows, order.tolist()))
        with values_kept(self._task_heads()):
            output: Any = self.evaluation_loop(loader, prefix, prediction_loss_only=False, metric_key_prefix=prefix)
        head = self._task_heads().head(rows.task.name)
        logits, labels, loss = collected(rows, order, output, head, self.args.device)
        return logits, labels, loss, {} if loss is None else rows.score(cast("Any", logits), loss)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Logits and scores: a `PredictionOutput` for an `EncodedTask`, a dict of them for examples by task.

        Examples may lack labels, as in a test set, and then have no scores. `EncodedTask.predictions` turns logits
        into classes, numbers, tags or answers.

        Args:
            test_dataset: Examples to predict by task, or an `EncodedTask`.
            ignore_keys: Not supported: leave it out.
            metric_key_prefix: Prefix of the names of the scores.
        """
        check_ignore_keys(ignore_keys)
        if isinstance(test_dataset, EncodedTask):
            start = time.time()
            logits, labels, loss, found = self._run(test_dataset, metric_key_prefix)
            found = found if loss is None else {"loss": loss, **found}
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            metrics |= speed(metric_key_prefix, start, self._examples_a_step(), test_dataset)
            return PredictionOutput(logits, labels, metrics)
        if test_dataset is None:
            raise ConfigError("test_dataset is None: pass a dict with the examples of each task.")
        sets = evaluation_sets(self.tasks, test_dataset, self._encode, needed=True, argument="test_dataset")
        return {key: self.predict(rows, metric_key_prefix=f"{metric_key_prefix}_{key}") for key, rows in sets.items()}

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Loss, outputs and labels of a batch of one task; see `evaluation.example_outputs`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        loss = None if outputs.loss is None else outputs.loss.detach()
        if prediction_loss_only:
            return loss, None, None
        ((task, logits),) = outputs.logits.items()
        (labels,) = inputs["labels"].values() if "labels" in inputs else (None,)
        padding = (inputs["attention_mask"] == 0).sum(1, keepdim=True) if self.collator.left else None
        return loss, *example_outputs(self._task_heads().head(task), logits, labels, padding)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with the loss of each task and, once an epoch, the probabilities of the tasks."""
        if "loss" in logs:
            losses = self._losses.pop(self._sum)
            if losses:
                logs |= losses | new_probabilities(self._current_sampler(), self.state.log_history)
                logs |= {} if self._selection is None else self._selection.pop(self._sum)
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes `README.md` with the tasks, the method, the sampling, the parameters and the results."""
        if self.is_world_process_zero():
            write_model_card(self, kwargs)
