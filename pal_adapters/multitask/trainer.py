"""`transformers.Trainer` for many tasks on one model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PredictionOutput, get_last_checkpoint

from pal_adapters.errors import ConfigError

from .arguments import MultiTaskTrainingArguments
from .collate import Batch, MultiTaskCollator
from .distributed import check_processes, load_whole_state, whole_parameters, whole_state
from .encoding import ConcatTasks, EncodedTask
from .heads import HeadConfig, count_items
from .model_card import write_model_card
from .optim import UncorrectedAdamW, pals_schedule
from .sampling import MultiTaskBatchSampler, Strategy, get_strategy, uncertainty
from .storage import StorageError, added_parameters
from .task import Task, check_tasks
from .task_heads import TaskHeads

if TYPE_CHECKING:
    from .presets import Preset

Rows = Any
"""Rows of a task: a `datasets.Dataset`, or an `EncodedTask`."""


@dataclass
class Candidates:
    """Rows that a `BatchSelector` may choose from.

    Args:
        tasks: Names of all tasks.
        task_ids: For each of the `b` rows the number of its task `[b]`.
        logits: For each task in the batch the logits of its rows, in their order; see `HeadConfig`.
        rows: For each task the numbers of its rows among the `b`.
        num_select: How many to choose.
        batch: The collated batch itself.
    """

    tasks: tuple[str, ...]
    task_ids: list[int]
    logits: dict[str, Tensor]
    rows: dict[str, list[int]]
    num_select: int
    batch: Batch


class BatchSelector(Protocol):
    """Chooses the rows to train on, such as the least certain ones of CA-MTL."""

    def select(self, candidates: Candidates) -> Sequence[int] | Tensor:
        """Numbers of the rows to keep, each from 0 to `b - 1`."""
        ...


class MultiTaskTrainer(Trainer):
    """A `transformers.Trainer` that draws batches of many tasks, and does everything else as that one does.

    * The loss of a step is that of `TaskHeads`, over all rows of the step: gradient accumulation and processes of a
      distributed run change nothing in it.
    * `loss_<task>` is logged beside `loss`, and in every epoch once the probabilities of the tasks.
    * Evaluation gives `eval_<task>_<metric>`, `eval_<task>_loss` and `eval_average`, the `eval_aggregate` of the
      primary metrics of all tasks; a metric of which less is better counts with the opposite sign.
    * A checkpoint has the adapters, heads and, if it trains, the base; it is also a folder for
      `TaskHeads.from_pretrained`. A run that is killed and started again with
      `train(resume_from_checkpoint=last_checkpoint(output_dir))` goes on with the same batches and losses.
    * In a distributed run all processes train the same task in a step, unless batches are mixed. Parameters of tasks
      that are absent from a step have no gradient, and the optimiser leaves them alone.

    Args:
        model: `TaskHeads`. Heads for tasks that it lacks are added.
        args: The arguments.
        tasks: The tasks, with their data.
        train_dataset: By task the rows to train on, instead of the task's own split.
        eval_dataset: By task the rows to evaluate on, instead of the task's own splits. Tasks that are not in it are
            not evaluated.
        processing_class: The tokenizer.
        strategy: A strategy of one's own, see `sampling.Strategy`, instead of `args.sampling`.
        batch_selector: What chooses the rows of `sampling="uncertainty"`; by default `UncertaintySelector`.
        preset: The recipe that the run follows: warns where the model differs from it.
        **kwargs: Other arguments of `transformers.Trainer`.

    Raises:
        ConfigError: For arguments that do not go together; before anything is trained.
        TaskDataError: For rows that do not fit their task.
    """

    args: MultiTaskTrainingArguments

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
        preset: Preset | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, TaskHeads):
            raise ConfigError(f"model is a {type(model).__name__}: pass TaskHeads(model).")
        if not isinstance(args, MultiTaskTrainingArguments):
            raise ConfigError(f"args is a {type(args).__name__}: pass MultiTaskTrainingArguments.")
        for name in ("data_collator", "compute_metrics", "model_init", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ConfigError(f"{name} has no effect here, where each Task says what it needs: leave it out.")
        if getattr(args, "group_by_length", False):
            raise ConfigError("group_by_length=True has no effect here, where rows are drawn by task: leave it out.")
        if processing_class is None or getattr(processing_class, "pad_token_id", None) is None:
            raise ConfigError("processing_class needs to be a tokenizer with a padding token.")
        self.tasks = check_tasks(tasks or ())
        self.strategy = strategy or get_strategy(args.sampling, temperature=args.sampling_temperature)
        if strategy is not None and args.sampling != "proportional":
            raise ConfigError(f"sampling={args.sampling!r} and strategy are both given: leave one of them out.")
        check_processes(args, model, mixed=args.mixed_batches or self.strategy is uncertainty)
        if self.strategy is not uncertainty and batch_selector is not None:
            raise ConfigError("batch_selector has no effect without sampling='uncertainty': leave it out.")
        if self.strategy is uncertainty and batch_selector is None:
            from .selectors import UncertaintySelector

            batch_selector = UncertaintySelector()
        self.batch_selector = batch_selector
        if preset is not None:
            preset.check(model)
        self.preset = preset
        self._encode = partial(self._encoded, tokenizer=processing_class, max_length=args.max_length)
        unknown = [name for name in train_dataset or () if name not in self.tasks]
        if unknown:
            raise ConfigError(f"train_dataset has {unknown[0]!r}, which is no task: {', '.join(self.tasks)}.")
        training = {
            name: self._encode(t, self._train_rows(t, train_dataset), "training") for name, t in self.tasks.items()
        }
        evaluating = self._evaluation_rows(
            eval_dataset, needed=str(args.eval_strategy) not in ("no", "IntervalStrategy.NO")
        )
        self._add_heads(model)
        heads = {task: model.head(task).config for task in model.tasks}
        self.collator = MultiTaskCollator(
            processing_class, heads, pad_to_multiple_of=8 if args.fp16 or (args.bf16 and not args.use_cpu) else None
        )
        self._model_tasks = model.tasks
        if not args.adam_bias_correction:
            kwargs["optimizer_cls_and_kwargs"] = (
                UncorrectedAdamW,
                {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon},
            )
        self._sampler: MultiTaskBatchSampler | None = None
        self._losses: Tensor | None = None
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
            # It would round all that is passed to the model and back, labels and counts among it. Autocast does not.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.model_accepts_loss_kwargs = True  # the loss is over the whole step
        self.label_names = ["labels"]
        self.add_callback(_Steps(self))
        for callback in list(self.callback_handler.callbacks):
            if type(callback) is ProgressCallback:
                self.remove_callback(callback)
                self.add_callback(_Progress())

    # Data

    @staticmethod
    def _encoded(task: Task, rows: Rows, where: str, *, tokenizer: Any, max_length: int) -> EncodedTask:
        if isinstance(rows, EncodedTask):
            return rows
        return EncodedTask(task, rows, tokenizer, max_length, where=where)

    @staticmethod
    def _train_rows(task: Task, given: Mapping[str, Rows] | None) -> Rows:
        if given is not None and task.name in given:
            return given[task.name]
        if task.train_split not in task.dataset:
            there = ", ".join(task.dataset) or "none"
            raise ConfigError(f"task {task.name!r} has no split {task.train_split!r} to train on; it has: {there}.")
        return task.dataset[task.train_split]

    def _evaluation_rows(self, given: Mapping[str, Rows] | None, *, needed: bool) -> dict[str, EncodedTask]:
        found: dict[str, EncodedTask] = {}
        if given is not None:
            for name, rows in given.items():
                task = rows.task if isinstance(rows, EncodedTask) else self.tasks.get(name)
                if task is None or task.name not in self.tasks:
                    raise ConfigError(f"eval_dataset has {name!r}, which is no task: {', '.join(self.tasks)}.")
                found[name] = self._encode(task, rows, f"eval_dataset[{name!r}]")
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

    def _add_heads(self, model: TaskHeads) -> None:
        for name, task in self.tasks.items():
            if name not in model.routes:
                model.add(
                    name, task.head or task.head_config(), adapter=task.adapter, weight=task.weight, loss=task.loss
                )
            there, wanted = model.head(name).config, task.head_config()
            if _shape(there) != _shape(wanted):
                raise ConfigError(
                    f"task {name!r}: its head on the model is {there.kind} with {there.num_labels} labels, but the "
                    f"task is {wanted.kind} with {wanted.num_labels}."
                )

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

    # Steps

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        """The batches of one step, and for each task over how many items of the step its loss is a mean `[t]`."""
        batches: list[Batch] = []
        for _ in range(num_batches):
            try:
                batch = next(epoch_iterator)
            except StopIteration:
                break
            batches.append(self._selected(batch) if self.batch_selector is not None else batch)
        counts = torch.zeros(len(self._model_tasks), device=device)
        for batch in batches:
            for task, labels in batch["labels"].items():
                number = self.collator.numbers[task]
                counts[number] += count_items(self.collator.heads[task].kind, labels).to(device)
        return batches, self.accelerator.reduce(counts, "sum") if self.args.world_size > 1 else counts

    def _prepare_input(self, data: Any) -> Any:
        # The host makes all floats those of DeepSpeed's config, which rounds the labels of a regression.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _selected(self, batch: Batch) -> Batch:
        assert self.batch_selector is not None
        model = cast("TaskHeads", self.accelerator.unwrap_model(self.model))
        model.train()  # as in the released code; also in the first step, so that a resumed run chooses the same
        batch = cast("Batch", self._prepare_inputs(batch))
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        examples = self.collator.examples(batch)
        rows: dict[str, list[int]] = {}
        for number, (task, _) in enumerate(examples):
            rows.setdefault(task, []).append(number)
        chosen = self.batch_selector.select(
            Candidates(
                tasks=self._model_tasks,
                task_ids=[self.collator.numbers[task] for task, _ in examples],
                logits=logits,
                rows=rows,
                num_select=self._train_batch_size,
                batch=batch,
            )
        )
        return self.collator.take(batch, [int(row) for row in chosen])

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, as its part of the whole step."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
            sums = torch.stack([outputs.task_losses, outputs.task_counts])
            self._losses = sums if self._losses is None else self._losses + sums
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self) -> Any:
        """What a forward pass is run in: with FSDP too autocast."""
        stack = super().compute_loss_context_manager()
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if self.is_fsdp_enabled and half is not None:
            stack.enter_context(torch.autocast(self.args.device.type, half))
        return stack

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The optimiser, with groups of their own for what learns at `attention_learning_rate`."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args)
        rate = self.args.attention_learning_rate
        if created and rate is not None:
            model = cast("TaskHeads", self.accelerator.unwrap_model(self.model))
            added = added_parameters(model.backbone, model._base_tensors().values())
            fast = {id(p) for n, p in added.items() if {"query", "key", "value"} & set(n.split("."))}
            if not fast:
                raise ConfigError("attention_learning_rate has no effect: no task module has an attention.")
            for group in list(optimizer.param_groups):
                chosen = [p for p in group["params"] if id(p) in fast]
                group["params"] = [p for p in group["params"] if id(p) not in fast]
                if chosen:
                    optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the arguments, or the one of PALs."""
        if self.lr_scheduler is None and self.args.schedule == "pals":
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                cast("Any", optimizer or self.optimizer),
                partial(pals_schedule, warmup_steps=warmup, steps=num_training_steps),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: adapters and heads differ from row to row."""
        return 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with the loss of each task and, once an epoch, the probabilities of the tasks."""
        if "loss" in logs and self._losses is not None:
            totals = self._losses.double()
            totals = self.accelerator.reduce(totals, "sum") if self.args.world_size > 1 else totals
            for task, loss, count in zip(self._model_tasks, *totals.tolist(), strict=True):
                if count:
                    logs[f"loss_{task}"] = loss / count
            self._losses = None
            logs.update(self._probabilities())
        super().log(logs, *args, **kwargs)

    def _probabilities(self) -> dict[str, float]:
        assert self._sampler is not None
        epoch = self._sampler.epoch
        if any(entry.get("sampling_epoch") == epoch + 1 for entry in self.state.log_history):
            return {}
        shares = self._sampler.probabilities().tolist()
        return {"sampling_epoch": epoch + 1} | {
            f"sampling_{name}": share for name, share in zip(self._sampler.names, shares, strict=True)
        }

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores of all tasks, of the given rows, or of those that the trainer was made with.

        Args:
            eval_dataset: By task the rows to evaluate on, or the name of an evaluation set.
            ignore_keys: Without a meaning here.
            metric_key_prefix: What the names begin with.
        """
        sets = cast("Mapping[str, EncodedTask]", self.eval_dataset)
        if isinstance(eval_dataset, str):
            sets = {eval_dataset: sets[eval_dataset]}
        elif eval_dataset is not None:
            sets = self._evaluation_rows(eval_dataset, needed=True)
        if not sets:
            raise ConfigError("there is nothing to evaluate: no task has validation rows.")
        metrics: dict[str, float] = {}
        primary: dict[str, float] = {}
        losses = []
        for key, rows in sets.items():
            output = self._run(rows, f"{metric_key_prefix}_{key}")
            losses.append(output.metrics[f"{metric_key_prefix}_{key}_loss"])
            found = rows.score(output.predictions, losses[-1])
            metrics |= {name: v for name, v in output.metrics.items() if name.endswith("_loss")}
            metrics |= {f"{metric_key_prefix}_{key}_{name}": value for name, value in found.items()}
            primary.setdefault(rows.task.name, rows.primary(found))  # of several splits the first
        aggregate: Any = getattr(np, self.args.eval_aggregate)
        metrics[f"{metric_key_prefix}_average"] = float(aggregate(list(primary.values())))
        metrics[f"{metric_key_prefix}_loss"] = float(np.mean(losses))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _run(self, rows: EncodedTask, prefix: str) -> Any:
        only_loss = rows.task.kind == "language_modeling"
        return self.evaluation_loop(
            self.get_eval_dataloader(rows), prefix, prediction_loss_only=only_loss, metric_key_prefix=prefix
        )

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Logits and scores: a `PredictionOutput` for `EncodedTask` rows, a dict of them for rows by task."""
        if isinstance(test_dataset, EncodedTask):
            output = self._run(test_dataset, metric_key_prefix)
            loss = output.metrics[f"{metric_key_prefix}_loss"]
            found = {f"{metric_key_prefix}_{n}": v for n, v in test_dataset.score(output.predictions, loss).items()}
            return PredictionOutput(output.predictions, output.label_ids, {**output.metrics, **found})
        sets = self._evaluation_rows(test_dataset, needed=True)
        return {key: self.predict(rows, metric_key_prefix=f"{metric_key_prefix}_{key}") for key, rows in sets.items()}

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Loss, logits and labels of a batch of one task."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        loss = outputs.loss.detach()
        if prediction_loss_only:
            return loss, None, None
        (logits,) = outputs.logits.values()
        (labels,) = inputs["labels"].values()
        return loss, logits.detach().float(), labels

    # Files

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains. `resume_from_checkpoint=True` takes the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(cast("str", self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ConfigError(f"{self.args.output_dir} has no whole checkpoint to resume from: start without one.")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model to a folder. With FSDP all processes have to call it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        with whole_parameters(self.accelerator.unwrap_model(self.model)):
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or cast("str", self.args.output_dir))
        if not self.args.should_save:
            return
        model = cast("TaskHeads", self.accelerator.unwrap_model(self.model))
        model.save_pretrained(directory, checkpoint=self.is_in_train)
        cast("Any", self.processing_class).save_pretrained(directory)
        torch.save(self.args, directory / "training_args.bin")

    def _save_checkpoint(self, model: Any, trial: Any, **kwargs: Any) -> None:
        directory = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(directory, ignore_errors=True)  # half a checkpoint is worse than none
            last = last_checkpoint(str(directory.parent))
            raise StorageError(
                f"{directory} cannot be written ({' '.join(str(error).split())[:200]}). The last whole checkpoint is "
                f"{last or 'none'}; make room and resume from it."
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(cast("torch.optim.Optimizer", self.optimizer))
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(cast("Any", self.lr_scheduler).state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            folder = Path(checkpoint)
            state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            load_whole_state(cast("torch.optim.Optimizer", self.optimizer), state)
            cast("Any", self.lr_scheduler).load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        cast("TaskHeads", self.accelerator.unwrap_model(self.model)).restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = cast("str", self.state.best_model_checkpoint)
        cast("TaskHeads", self.accelerator.unwrap_model(self.model)).restore(best)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes `README.md` with the tasks, the method, the sampling, the parameters and the results."""
        if self.is_world_process_zero():
            write_model_card(self, kwargs)


def _shape(head: HeadConfig) -> tuple[Any, ...]:
    return head.kind, head.num_labels, head.num_choices


class _Steps(TrainerCallback):
    """Keeps the sampler at the epoch of the run, logs where a checkpoint is, and clips tensor by tensor."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The loader may be wrapped too deep for its `set_epoch` to arrive.
        sampler = self.trainer._sampler
        assert sampler is not None
        sampler.set_epoch(state.global_step // sampler.steps_per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        # The sums of the loss are not part of a checkpoint, so they end where it is.
        if args.save_strategy == "steps" and state.save_steps and state.global_step % state.save_steps == 0:
            control.should_log = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if args.save_strategy == "epoch":
            control.should_log = True
        return control

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_tensor_grad_norm is not None:
            for parameter in kwargs["model"].parameters():
                if parameter.grad is not None:
                    torch.nn.utils.clip_grad_norm_(parameter, args.max_tensor_grad_norm)


class _Progress(ProgressCallback):
    """The host's progress bar, with the last loss of each task behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        bar: Any = self.training_bar
        if state.is_world_process_zero and bar is not None and logs:
            losses = {name[5:]: f"{value:.3f}" for name, value in logs.items() if name.startswith("loss_")}
            if losses:
                bar.set_postfix(losses, refresh=False)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a folder that was written to its end, or `None`: what to resume from after a crash."""
    folder = Path(output_dir)
    if not folder.is_dir() or get_last_checkpoint(str(folder)) is None:
        return None
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # is written last
        except (OSError, ValueError):
            continue
        return str(path)
    return None
