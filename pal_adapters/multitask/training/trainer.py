"""`transformers.Trainer` for many tasks on one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback

from pal_adapters.errors import ConfigError, PalAdaptersError
from pal_adapters.multitask.model.heads import count_items
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.sampling.selectors import BatchSelector, Candidates, UncertaintySelector
from pal_adapters.multitask.sampling.strategies import MultiTaskBatchSampler, Strategy, get_strategy, uncertainty
from pal_adapters.multitask.tasks.collate import Batch, MultiTaskCollator
from pal_adapters.multitask.tasks.encoding import ConcatTasks
from pal_adapters.multitask.tasks.task import Task, check_tasks

from .arguments import MultiTaskTrainingArguments
from .callbacks import Progress, Steps
from .checkpoints import Checkpoints
from .distributed import check_processes
from .evaluation import Aggregate, Evaluation
from .loaders import Rows
from .model_card import write_model_card
from .optim import UncorrectedAdamW, pals_schedule
from .task_setup import add_heads, start_at_mean, warn_of_resting_adapters

if TYPE_CHECKING:
    from pal_adapters.multitask.presets import Preset


class DivergedError(PalAdaptersError, ArithmeticError):
    """The loss is no longer a finite number."""


class MultiTaskTrainer(Evaluation, Checkpoints):
    """A `transformers.Trainer` that draws batches of many tasks, and does everything else as that one does.

    * The loss of a step is that of `TaskHeads`, over all rows of the step: gradient accumulation and processes of a
      distributed run change nothing in it.
    * `loss_<task>` is logged beside `loss`, and in every epoch once the probabilities of the tasks; with
      `sampling="uncertainty"` also since the entry before how many rows of each task were trained on, `chosen_<task>`,
      and how many `candidates` went forward for that.
    * A new head of a regression starts at the mean of the labels: its bias, as long as it is 0.
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
        aggregate: What `eval_average` is of the primary scores by task, instead of `args.eval_aggregate`.
        preset: The recipe that the run follows: warns where the model differs from it.
        **kwargs: Other arguments of `transformers.Trainer`.

    Raises:
        ConfigError: For arguments that do not go together; before anything is trained.
        TaskDataError: For rows that do not fit their task.
        DivergedError: From `train`, if the loss becomes infinite or NaN, except in fp16, which passes over such steps.
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
        aggregate: Aggregate | None = None,
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
            batch_selector = UncertaintySelector()
        self.batch_selector = batch_selector
        if aggregate is not None and args.eval_aggregate != "mean":
            raise ConfigError(f"eval_aggregate={args.eval_aggregate!r} and aggregate are both given: leave one out.")
        self.aggregate = aggregate
        if isinstance(batch_selector, UncertaintySelector):
            batch_selector.check(self.tasks.values())
        if preset is not None:
            preset.check(model, args)
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
        add_heads(model, self.tasks.values())
        for rows in training.values():
            start_at_mean(model.head(rows.task.name), rows)
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
        self._chosen: Tensor | None = None
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
        self.add_callback(Steps(self))
        for callback in list(self.callback_handler.callbacks):
            if type(callback) is ProgressCallback:
                self.remove_callback(callback)
                self.add_callback(Progress())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, after a warning of adapters that rest. `True` resumes from the last checkpoint that is whole."""
        warn_of_resting_adapters(cast("TaskHeads", self.accelerator.unwrap_model(self.model)), self.tasks)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        """The batches of one step, and for each task over how many items of the step its loss is a mean `[t]`."""
        batches: list[Batch] = []
        for _ in range(num_batches):
            try:
                batch = next(epoch_iterator)
            except StopIteration:
                break
            batches.append(self._selected(batch, len(batches)) if self.batch_selector is not None else batch)
        counts = torch.zeros(len(self._model_tasks), device=device)
        for batch in batches:
            for task, labels in batch["labels"].items():
                number = self.collator.numbers[task]
                counts[number] += count_items(self.collator.heads[task].kind, labels).to(device)
        return batches, self.accelerator.reduce(counts, "sum") if self.args.world_size > 1 else counts

    def _prepare_input(self, data: Any) -> Any:
        # The host makes all floats those of DeepSpeed's config, which rounds the labels of a regression.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _selected(self, batch: Batch, number: int) -> Batch:
        """The rows to train on of the candidates in batch `number` of a step."""
        assert self.batch_selector is not None
        model = cast("TaskHeads", self.accelerator.unwrap_model(self.model))
        model.train(getattr(self.batch_selector, "mode", "train") == "train")
        batch = cast("Batch", self._prepare_inputs(batch))
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        # Random numbers of the step's own: the host restores the state of a resumed run after this, not before.
        place = (self.args.seed, self.state.global_step, self.args.process_index, number)
        seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), self.compute_loss_context_manager():
            torch.manual_seed(seed)
            logits = model(**inputs).logits
        model.train()
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
        if self._chosen is None:
            self._chosen = torch.zeros(len(self._model_tasks) + 1, device=self.args.device)
        kept = [self.collator.numbers[examples[int(row)][0]] for row in chosen]
        counts = [kept.count(number) for number in range(len(self._model_tasks))]
        self._chosen += torch.tensor([*counts, len(examples)], device=self._chosen.device)
        return self.collator.take(batch, [int(row) for row in chosen])

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Loss and gradients of a batch."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self.args.fp16 and not torch.isfinite(loss):
            tasks = " and ".join(repr(task) for task in inputs["labels"])
            raise DivergedError(
                f"task {tasks}: the loss is {loss.item()} in step {self.state.global_step + 1}; lower learning_rate "
                f"(now {self.args.learning_rate:g})."
            )
        return loss

    def draws(self) -> dict[str, int]:
        """How often each task was drawn so far: steps, or rows where batches are mixed.

        Under `sampling="uncertainty"` tasks are not drawn; see `chosen_<task>` in the log.
        """
        counts = np.zeros(len(self.tasks), dtype=np.int64)
        left, epoch = self.state.global_step, 0
        while left and self._sampler is not None:
            drawn = self._sampler.draws(epoch)[:left]
            counts += np.bincount(drawn.ravel(), minlength=len(counts))
            left, epoch = left - len(drawn), epoch + 1
        return dict(zip(self.tasks, counts.tolist(), strict=True))

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
            added = model.added_parameters()
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
            if self._chosen is not None:
                rows = self._chosen
                rows = self.accelerator.reduce(rows, "sum") if self.args.world_size > 1 else rows
                *chosen, candidates = rows.tolist()
                logs |= {f"chosen_{task}": count for task, count in zip(self._model_tasks, chosen, strict=True)}
                logs["candidates"] = candidates
                self._chosen = None
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

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes `README.md` with the tasks, the method, the sampling, the parameters and the results."""
        if self.is_world_process_zero():
            write_model_card(self, kwargs)
