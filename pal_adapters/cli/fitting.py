"""One training run with `MultiTaskTrainer`: keeps the best epoch, and scores the tasks on data it has not seen."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EarlyStoppingCallback
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import (
    EncodedTask,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    Task,
    TaskDataError,
    TaskHeads,
    train_dev_split,
)
from pal_adapters.multitask.model.heads import pool

_ONE_LABEL = ("single_label", "multiple_choice", "regression")


@dataclass
class Data:
    """The encoded examples of a task: for training, for selecting the best epoch, and for the final scores."""

    task: Task
    train: EncodedTask
    dev: EncodedTask
    test: dict[str, EncodedTask]  # by split; without a validation split, the examples that selected the epoch


def encode(task: Task, tokenizer: Any, max_length: int, *, seed: int, limit: int | None = None) -> Data:
    """Holds out a tenth of the training examples, of which at most `limit` are used, to select the best epoch."""
    if task.kind == "language_modeling":
        raise ConfigError(f"task {task.name!r}: language modeling is not supported here; use MultiTaskTrainer")
    if task.train_split not in task.dataset:
        raise TaskDataError(f"task {task.name!r} has no split {task.train_split!r} to train on")
    rows = task.dataset[task.train_split]
    if limit is not None and len(rows) > limit:
        rows = rows.shuffle(seed=42, keep_in_memory=True).select(range(limit))
    parts = held_out(task, rows, seed)
    train, dev = (EncodedTask(task, part, tokenizer, max_length, where="training") for part in parts)
    tests = {
        split: EncodedTask(task, task.dataset[split], tokenizer, max_length, where=split)
        for split in task.validation_splits
        if split in task.dataset
    }
    return Data(task, train, dev, tests or {"held out of training": dev})


def held_out(task: Task, rows: datasets.Dataset, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training examples without a tenth, and that tenth: of each class, if an example has one label."""
    label = task.label_column if task.kind in _ONE_LABEL else None
    return train_dev_split(rows, seed=seed, label_column=label, split_columns=task.split_columns)


def make_trainer(model: TaskHeads, data: Sequence[Data], tokenizer: Any, folder: str, **options: Any) -> Any:
    """A trainer for these tasks; it adds missing heads."""
    arguments = MultiTaskTrainingArguments(folder, per_device_eval_batch_size=64, report_to=[], **options)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # runs this small do not benefit from more
    trainer = MultiTaskTrainer(
        model,
        arguments,
        [one.task for one in data],
        train_dataset={one.task.name: one.train for one in data},
        eval_dataset={one.task.name: one.dev for one in data},
        processing_class=tokenizer,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Bar)
    return trainer


def train(
    model: TaskHeads,
    data: Sequence[Data],
    tokenizer: Any,
    output: Path,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int = 16,
    max_steps: int | None = None,
    attention_factor: float = 1.0,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    select: str = "metric",
    patience: int | None = None,
    seed: int = 42,
    steps_per_epoch: int | None = None,
    **options: Any,
) -> Any:
    """Trains, restores the best epoch and removes the checkpoints."""
    per_epoch = steps_per_epoch or sum(math.ceil(len(one.train) / batch_size) for one in data)
    steps = min(epochs * per_epoch, max_steps or epochs * per_epoch)
    with tempfile.TemporaryDirectory(prefix="checkpoints_", dir=output) as folder:
        trainer = make_trainer(
            model,
            data,
            tokenizer,
            folder,
            max_steps=steps,
            steps_per_epoch=per_epoch,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            attention_learning_rate=learning_rate * attention_factor if attention_factor != 1 else None,
            warmup_steps=round(warmup * steps),
            weight_decay=weight_decay,
            seed=seed,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="average" if select == "metric" else "loss",
            greater_is_better=select == "metric",
            logging_steps=10,
            **options,
        )
        if patience is not None:
            trainer.add_callback(EarlyStoppingCallback(patience))
        with warnings.catch_warnings():
            # transformers 4, when checkpoints are written within a second of each other
            warnings.filterwarnings("ignore", "mtime may not be reliable")
            trainer.train()
    return trainer


class _Bar(ProgressCallback):
    """One progress bar for the steps, without a line for each log entry."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        bar: Any = self.training_bar
        if bar is not None and logs and "loss" in logs:
            bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_prediction_step(self, *_: Any, **__: Any) -> None: ...


def predict(trainer: Any, data: Data) -> dict[str, np.ndarray]:
    """Logits of the examples to score, by split."""
    return {split: trainer.predict(rows).predictions for split, rows in data.test.items()}


def score(data: Data, logits: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """All metrics, by split."""
    return {split: rows.score(logits[split]) for split, rows in data.test.items()}


def trivial(data: Data) -> dict[str, dict[str, float]]:
    """Metrics of predicting the most frequent training class, or the mean training label, for every example.

    Tasks whose examples have several labels have no such prediction, so for them there are none.
    """
    labels = data.train.labels
    if labels is None or data.task.kind not in _ONE_LABEL:
        return {split: {} for split in data.test}
    if data.task.kind == "regression":
        return score(data, {split: np.full(len(rows), labels.mean()) for split, rows in data.test.items()})
    counts = np.bincount(labels, minlength=2)
    answer = np.eye(len(counts))[counts.argmax()]
    return score(data, {split: np.tile(answer, (len(rows), 1)) for split, rows in data.test.items()})


def summary(trainer: Any, data: Data) -> dict[str, Any]:
    """The entry of a trained task in `results.json`."""
    name, metrics = data.task.name, score(data, predict(trainer, data))
    primary = next(iter(next(iter(metrics.values()))))
    history = [entry[f"eval_{name}_{primary}"] for entry in trainer.state.log_history if "eval_average" in entry]
    return {
        "benchmark": data.task.benchmark,
        "rows": {"train": len(data.train), "dev": len(data.dev)} | {s: len(rows) for s, rows in data.test.items()},
        "primary_metric": primary,
        "metrics": metrics,
        "baseline": trivial(data),
        "dev_history": history,
        "best_epoch": math.ceil((trainer.state.best_global_step or 0) / trainer.args.steps_per_epoch),
    }


def size(model: torch.nn.Module) -> int:
    """The number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_head(model: TaskHeads, task: str, folder: Path) -> None:
    """Saves the head of a task as `head.safetensors` in the folder of its adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    head = model.head(task)
    assert head.linear is not None
    weights = {name: p.detach().cpu().contiguous() for name, p in head.linear.named_parameters()}
    save_file(weights, folder / "head.safetensors", metadata={"task": task, "pooling": head.config.pooling})


def load_head(model: TaskHeads, task: str, folder: Path) -> None:
    """Loads a head that `save_head` saved."""
    linear = model.head(task).linear
    assert linear is not None
    linear.load_state_dict(load_file(folder / "head.safetensors"))


@contextmanager
def frozen(base: Any, pooling: str) -> Iterator[None]:
    """While only heads on pooled states train, runs the frozen base once per example, without dropout."""
    known: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def forward(attention_mask: Tensor, return_dict: bool = True, **inputs: Tensor) -> BaseModelOutput:
        rows = torch.stack(list(inputs.values()), dim=-1).cpu().numpy()  # [r, n, inputs]
        kept = attention_mask.bool().cpu().numpy()
        keys = [row[keep].tobytes() for row, keep in zip(rows, kept, strict=True)]
        new = list({key: number for number, key in enumerate(keys) if key not in known}.values())
        if new:
            training = base.training
            base.eval()
            some = {name: tensor[new] for name, tensor in inputs.items()}
            hidden = type(base).forward(base, attention_mask=attention_mask[new], **some).last_hidden_state
            base.train(training)
            pooled = pool(hidden, attention_mask[new], pooling)
            known.update(zip((keys[number] for number in new), pooled, strict=True))
        # Pooling equal states returns that state, whatever the pooling.
        states: Any = torch.stack([known[key] for key in keys]).unsqueeze(1).expand(-1, rows.shape[1], -1)
        return BaseModelOutput(last_hidden_state=states)

    base.forward = forward
    try:
        yield
    finally:
        del base.forward
