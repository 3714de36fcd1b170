"""Evaluation of many tasks: the scores of each, and their aggregate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers.trainer_utils import PredictionOutput, speed_metrics

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.tasks.encoding import EncodedTask

from .loaders import Loaders

Aggregate = Callable[[Mapping[str, float]], float]
"""One number of the primary scores by task; of metrics where less is better they come with the opposite sign."""


class Evaluation(Loaders):
    """A Trainer that scores each task by its own metrics."""

    aggregate: Aggregate | None

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
            if eval_dataset not in sets:
                raise ConfigError(f"eval_dataset={eval_dataset!r} is not there: {', '.join(sets) or 'there is none'}.")
            sets = {eval_dataset: sets[eval_dataset]}
        elif eval_dataset is not None:
            sets = self._evaluation_rows(eval_dataset, needed=True)
        if not sets:
            raise ConfigError("there is nothing to evaluate: no task has validation rows.")
        metrics: dict[str, float] = {}
        primary: dict[str, float] = {}
        losses = []
        start = time.time()
        for key, rows in sets.items():
            output = self._run(rows, f"{metric_key_prefix}_{key}")
            losses.append(output.metrics[f"{metric_key_prefix}_{key}_loss"])
            found = rows.score(output.predictions, losses[-1])
            metrics |= {name: v for name, v in output.metrics.items() if name.endswith("_loss")}
            metrics |= {f"{metric_key_prefix}_{key}_{name}": value for name, value in found.items()}
            primary.setdefault(rows.task.name, rows.primary(found))  # of several splits the first
        named: Any = getattr(np, self.args.eval_aggregate)
        value = named(list(primary.values())) if self.aggregate is None else self.aggregate(primary)
        metrics[f"{metric_key_prefix}_average"] = float(value)
        metrics[f"{metric_key_prefix}_loss"] = float(np.mean(losses))
        metrics |= self._speed(metric_key_prefix, start, *sets.values())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _speed(self, prefix: str, start: float, *sets: EncodedTask) -> dict[str, float]:
        """Seconds since `start`, and rows and steps a second."""
        batch = self.args.eval_batch_size * self.args.world_size
        steps = sum(math.ceil(len(rows) / batch) for rows in sets)
        return speed_metrics(prefix, start, num_samples=sum(map(len, sets)), num_steps=steps)

    def _run(self, rows: EncodedTask, prefix: str) -> Any:
        order = np.argsort(-rows.lengths(), kind="stable")  # rows of like length in a batch: less padding
        output: Any = self.evaluation_loop(
            self.get_eval_dataloader(Subset(rows, order.tolist())),
            prefix,
            prediction_loss_only=False,
            metric_key_prefix=prefix,
        )
        if rows.task.kind == "language_modeling":  # the mean over all tokens, however many are in a batch
            total, count = output.predictions.sum(0, dtype=np.float64)
            output.metrics[f"{prefix}_loss"] = float(total / max(count, 1))
            return output._replace(predictions=None, label_ids=None)
        back = np.argsort(order)
        labels = output.label_ids[back] if rows.has_labels else None
        return output._replace(predictions=output.predictions[back], label_ids=labels)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Logits and scores: a `PredictionOutput` for `EncodedTask` rows, a dict of them for rows by task.

        Rows may lack labels, as in a test set, and then have no scores; `EncodedTask.predictions` turns logits into
        classes, numbers, tags or answers.

        Args:
            test_dataset: By task the rows to predict, or the `EncodedTask` of one.
            ignore_keys: Without a meaning here.
            metric_key_prefix: What the names begin with.
        """
        if isinstance(test_dataset, EncodedTask):
            start = time.time()
            output = self._run(test_dataset, metric_key_prefix)
            found: dict[str, float] = {}
            if test_dataset.has_labels:
                found = test_dataset.score(output.predictions, output.metrics[f"{metric_key_prefix}_loss"])
            metrics = {**output.metrics, **{f"{metric_key_prefix}_{n}": value for n, value in found.items()}}
            metrics |= self._speed(metric_key_prefix, start, test_dataset)
            return PredictionOutput(output.predictions, output.label_ids, metrics)
        if test_dataset is None:
            raise ConfigError("test_dataset is None: pass a dict with the rows of each task.")
        sets = self._evaluation_rows(test_dataset, needed=True, name_of="test_dataset")
        return {key: self.predict(rows, metric_key_prefix=f"{metric_key_prefix}_{key}") for key, rows in sets.items()}

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Loss, logits and labels of a batch of one task; rows without labels have the logits alone.

        A language model has for logits the loss of each row as a sum, and over how many tokens it goes: `[b, 2]`.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        loss = None if outputs.loss is None else outputs.loss.detach()
        if prediction_loss_only:
            return loss, None, None
        ((task, logits),) = outputs.logits.items()
        logits = logits.detach().float()
        (labels,) = inputs["labels"].values() if "labels" in inputs else (None,)
        if self.collator.heads[task].kind == "language_modeling":
            head = cast("TaskHeads", self.accelerator.unwrap_model(self.model)).head(task)
            rows = zip(logits.split(1), cast("Tensor", labels).split(1), strict=True)
            losses = [torch.stack(head.loss(*row)) for row in rows]
            found = torch.stack(losses)
            return loss, found.masked_fill(found[:, 1:] == 0, 0.0), None  # a row of one token has nothing to predict
        if self.collator.left and logits.dim() == 3:
            # The host pads batches on the right to put them together: tokens have to begin at 0.
            padding = (inputs["attention_mask"] == 0).sum(1, keepdim=True)
            places = (torch.arange(logits.shape[1], device=logits.device) + padding) % logits.shape[1]
            logits = logits.gather(1, places.unsqueeze(-1).expand_as(logits))
            labels = None if labels is None else labels.gather(1, places)
        return loss, logits, labels
