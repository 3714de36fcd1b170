"""A small training loop: one task on a frozen base, or many tasks on a base that they train together."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

from pal_adapters.errors import ConfigError, PalAdaptersError

from .metrics import TaskMetric, primary_metric
from .models import MultiTaskModel
from .sampling import annealed_alpha, task_probabilities
from .tasks import TaskSpec


class DivergedError(PalAdaptersError, ArithmeticError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Args:
        epochs: Passes over the training rows. For several tasks, as many steps as one pass over all of them takes.
        learning_rate: Peak of the learning rate.
        attention_factor: By how much faster the queries, keys and values inside a task's modules learn. They start so
            small that a PAL attends to all tokens alike, and it takes large steps to change that. The authors of PALs
            offer a second optimizer for them, with a factor of 15.
        batch_size: Rows of a batch.
        max_steps: Upper bound on the number of steps of the whole run; `None` is no bound.
        warmup: Share of the steps in which the learning rate rises linearly; then it falls linearly to 0.
        weight_decay: Weight decay of AdamW, for matrices only.
        max_grad_norm: Gradients are scaled down to this norm.
        select: What the best epoch is chosen by: `"metric"`, the highest primary metrics, or `"loss"`, the lowest
            loss.
        patience: Epochs without a better one after which training stops; `None` never stops.
        seed: Seed of the order of the rows, of the draw of tasks and of dropout.
        progress: Whether to show a progress bar.
    """

    epochs: int = 5
    learning_rate: float = 1e-3
    attention_factor: float = 1.0
    batch_size: int = 16
    max_steps: int | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    select: Literal["metric", "loss"] = "metric"
    patience: int | None = None
    seed: int = 42
    progress: bool = True

    def __post_init__(self) -> None:
        if self.select not in ("metric", "loss"):
            raise ConfigError(f"select={self.select!r} is not allowed: use 'metric' or 'loss'.")
        for name in ("epochs", "batch_size", "max_steps", "patience"):
            value = getattr(self, name)
            if (value is not None or name not in ("max_steps", "patience")) and (
                not isinstance(value, int) or value < 1
            ):
                raise ConfigError(f"{name}={value!r} is not allowed: use an integer of at least 1.")
        for name in ("learning_rate", "attention_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed: use a number above 0.")


@dataclass
class EncodedSplit:
    """Rows of a task, ready for the model.

    Args:
        inputs: For each row what the tokenizer made of each of its choices.
        labels: The labels in their own type: `int`, or `float` for a regression.
        groups: For each row the key of its question, where a metric needs it.
    """

    inputs: list[list[dict[str, Any]]]
    labels: list[int] | list[float]
    groups: Sequence[Hashable] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> list[int]:
        """The number of tokens of the longest choice of each row."""
        return [max(len(choice.get("input_ids", ())) for choice in row) for row in self.inputs]


@dataclass
class TaskData:
    """The encoded rows of a task: to train on, to choose the best epoch with, and to test on."""

    spec: TaskSpec
    train: EncodedSplit
    dev: EncodedSplit
    test: dict[str, EncodedSplit]


@dataclass
class FitResult:
    """What a training run did. Scores are of the primary metric on the rows to choose with, one entry an epoch."""

    steps: int
    seconds: float
    best_epoch: int
    history: list[dict[str, float]] = field(default_factory=list)
    draws: dict[str, int] = field(default_factory=dict)


def encode_rows(spec: TaskSpec, rows: datasets.Dataset, tokenizer: Any, max_length: int) -> EncodedSplit:
    """Tokenizes rows without padding. What is too long is cut, the longer sentence of a pair first."""
    label_type = float if spec.is_regression else int
    labels = [label_type(label) for label in rows[spec.label_column]]
    columns = {name: rows[name] for name in {*spec.text_columns, *spec.group_columns}}
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    segments = [segment for record in records for segment in spec.segments(record)]
    pairs = segments[0][1] is not None
    texts = ([a for a, _ in segments], [b for _, b in segments]) if pairs else ([a for a, _ in segments],)
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    flat = [{name: encoded[name][i] for name in encoded} for i in range(len(segments))]
    inputs = [flat[i : i + spec.num_choices] for i in range(0, len(flat), spec.num_choices)]
    groups = [tuple(record[c] for c in spec.group_columns) for record in records] if spec.group_columns else None
    return EncodedSplit(inputs, labels, groups)


class BatchMaker:
    """Makes tensors of rows: pads them to the longest of the batch, all choices of a row next to each other."""

    def __init__(self, tokenizer: Any, device: torch.device) -> None:
        self._pad = DataCollatorWithPadding(tokenizer)
        self._device = device

    def __call__(self, spec: TaskSpec, split: EncodedSplit, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs, each `[b * choices, n]`, and labels `[b]` of the rows with these numbers."""
        features = [choice for row in rows for choice in split.inputs[row]]
        if "pooled" in features[0]:
            inputs: Mapping[str, Tensor] = {"pooled": torch.stack([choice["pooled"] for choice in features])}
        else:
            inputs = self.pad(features)
        labels = torch.tensor(
            [split.labels[row] for row in rows], dtype=torch.float32 if spec.is_regression else torch.long
        )
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}, labels.to(self._device)

    def pad(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What the tokenizer made of some inputs, each `[b, n]`."""
        return {name: tensor.to(self._device) for name, tensor in self._pad(list(features)).items()}


def precompute(model: MultiTaskModel, data: TaskData, batches: BatchMaker, *, batch_size: int = 64) -> TaskData:
    """Replaces the tokens of a task by what the frozen base makes of them, for training a head alone.

    The base runs once for each row instead of once in every epoch, and without dropout.
    """

    def pooled(split: EncodedSplit) -> EncodedSplit:
        vectors: dict[int, Tensor] = {}
        for rows in _by_length(split, batch_size):
            inputs, _ = batches(data.spec, split, rows)
            vectors.update(zip(rows, model.pool(data.spec.name, inputs).split(data.spec.num_choices), strict=True))
        inputs_of_rows = [[{"pooled": vector} for vector in vectors[row]] for row in range(len(split))]
        return EncodedSplit(inputs_of_rows, split.labels, split.groups)

    model.eval()
    with torch.no_grad():
        test = {name: pooled(split) for name, split in data.test.items()}
        return TaskData(data.spec, pooled(data.train), pooled(data.dev), test)


def predict(
    model: MultiTaskModel, spec: TaskSpec, split: EncodedSplit, batches: BatchMaker, *, batch_size: int = 64
) -> np.ndarray:
    """Logits `[rows, c]` in the order of the rows, without dropout."""
    logits: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for rows in _by_length(split, batch_size):
            inputs, _ = batches(spec, split, rows)
            logits.update(zip(rows, model(spec.name, inputs, choices=spec.num_choices).float().cpu(), strict=True))
    model.train(was_training)
    return torch.stack([logits[row] for row in range(len(split))]).numpy()


def score(spec: TaskSpec, split: EncodedSplit, logits: np.ndarray) -> dict[str, float]:
    """All metrics of a task for logits `[rows, c]`."""
    predictions = logits[:, 0] if spec.is_regression else logits.argmax(axis=1)
    return _score(spec, split, predictions.tolist())


def baseline(spec: TaskSpec, train: EncodedSplit, test: EncodedSplit) -> dict[str, float]:
    """Metrics of the answer that needs no input: the most frequent class of `train`, or its mean label."""
    if spec.is_regression:
        answer: float = float(np.mean(train.labels))
    else:
        answer = int(np.bincount(train.labels).argmax())
    return _score(spec, test, [answer] * len(test))


def _score(spec: TaskSpec, split: EncodedSplit, predictions: list[Any]) -> dict[str, float]:
    options = {} if split.groups is None else {"groups": split.groups}
    return TaskMetric(spec).compute(predictions=predictions, references=split.labels, **options)


def fit(model: MultiTaskModel, tasks: Sequence[TaskData], config: TrainingConfig, batches: BatchMaker) -> FitResult:
    """Trains the modules of the tasks, and the base if the model says so, and leaves the best epoch in the model.

    AdamW with linear warm-up and decay. Every step takes a batch of one task. With one task, an epoch is a pass over
    its rows in a new order; with several, each step draws the task with the annealed probabilities of
    `annealed_alpha`. After each epoch all tasks are scored on their `dev` rows; the epoch with the highest sum of
    primary metrics, or the lowest sum of losses, is kept, the earliest of equals.

    Raises:
        DivergedError: If the loss becomes infinite or NaN.
    """
    start = time.perf_counter()
    _seed_everything(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    draw = np.random.default_rng(config.seed)
    names = [task.spec.name for task in tasks]
    sizes = [len(task.train) for task in tasks]
    for task in tasks:
        if task.spec.is_regression:  # start from the mean instead of learning it step by step
            model.set_head_bias(task.spec.name, float(np.mean(task.train.labels)))
    parameters = model.prepare_training(names)
    optimizer = torch.optim.AdamW(_parameter_groups(parameters, config), lr=config.learning_rate)
    steps_per_epoch = sum(math.ceil(size / config.batch_size) for size in sizes)
    steps = min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)
    epochs = math.ceil(steps / steps_per_epoch)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)
    streams = [_endless(task.train, config.batch_size, generator) for task in tasks]
    result = FitResult(steps=steps, seconds=0.0, best_epoch=0, draws=dict.fromkeys(names, 0))
    best, best_score = {}, -math.inf
    model.train()
    with tqdm(total=steps, desc=" + ".join(names), disable=not config.progress, unit="step") as bar:
        for epoch in range(1, epochs + 1):
            probabilities = task_probabilities(sizes, annealed_alpha(epoch, epochs))
            for _ in range(min(steps_per_epoch, steps - (epoch - 1) * steps_per_epoch)):
                chosen = int(draw.choice(len(tasks), p=probabilities)) if len(tasks) > 1 else 0
                task = tasks[chosen]
                inputs, labels = batches(task.spec, task.train, next(streams[chosen]))
                loss = _loss(task.spec, model(task.spec.name, inputs, choices=task.spec.num_choices), labels)
                penalty = model.penalty(task.spec.name)
                loss = loss if penalty is None else loss + penalty
                if not math.isfinite(loss.item()):
                    raise DivergedError(
                        f"task {task.spec.name!r}: the loss is {loss.item()}; lower learning_rate "
                        f"(now {config.learning_rate})"
                    )
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                result.draws[task.spec.name] += 1
                bar.set_postfix(epoch=epoch, loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
            scores, total = {}, 0.0
            for task in tasks:
                logits = predict(model, task.spec, task.dev, batches)
                scores[task.spec.name] = score(task.spec, task.dev, logits)[primary_metric(task.spec)]
                total += -_dev_loss(task, logits) if config.select == "loss" else scores[task.spec.name]
            result.history.append(scores)
            bar.set_postfix(epoch=epoch, dev=f"{sum(scores.values()) / len(scores):.3f}")
            if total > best_score:
                best_score, result.best_epoch = total, epoch
                best = {name: p.detach().clone() for name, p in parameters.items()}
            elif config.patience is not None and epoch - result.best_epoch >= config.patience:
                result.steps = sum(result.draws.values())
                break
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    model.eval()
    result.seconds = time.perf_counter() - start
    return result


def _parameter_groups(parameters: Mapping[str, torch.nn.Parameter], config: TrainingConfig) -> list[dict[str, Any]]:
    """Groups by weight decay, which is for matrices, and by learning rate."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        parts = () if name.startswith("base.") else name.split(".")
        attends = any(part in parts for part in ("query", "key", "value"))
        groups.setdefault((parameter.ndim > 1, attends), []).append(parameter)
    return [
        {
            "params": members,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": config.learning_rate * (config.attention_factor if attends else 1.0),
        }
        for (decays, attends), members in groups.items()
    ]


def _loss(spec: TaskSpec, logits: Tensor, labels: Tensor) -> Tensor:
    if spec.is_regression:
        return F.mse_loss(logits[:, 0].float(), labels)
    return F.cross_entropy(logits.float(), labels)


def _dev_loss(task: TaskData, logits: np.ndarray) -> float:
    labels = torch.tensor(task.dev.labels, dtype=torch.float32 if task.spec.is_regression else torch.long)
    return _loss(task.spec, torch.from_numpy(logits), labels).item()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (hosts may draw from the global generator)
    torch.manual_seed(seed)


def _by_length(split: EncodedSplit, batch_size: int) -> Iterator[list[int]]:
    """All row numbers in batches of like length, so that little is padded."""
    lengths = split.lengths()
    order = sorted(range(len(split)), key=lambda row: lengths[row])
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def _endless(split: EncodedSplit, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches of row numbers, pass after pass, each pass in a new order.

    A pass is shuffled, then sorted by length within stretches of some batches, then its batches are shuffled: random
    enough to train on, and with far less padding.
    """
    lengths = split.lengths()
    stretch = batch_size * 16
    while True:
        order = torch.randperm(len(split), generator=generator).tolist()
        for i in range(0, len(order), stretch):
            order[i : i + stretch] = sorted(order[i : i + stretch], key=lambda row: lengths[row])
        cut = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for position in torch.randperm(len(cut), generator=generator).tolist():
            yield cut[position]
