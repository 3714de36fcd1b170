"""The metrics of a task as the benchmarks define them, as one `evaluate.Metric` that needs no download."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.metrics.builtin import score_labels

from .task import Task, get_task


class TaskMetric(evaluate.Metric):
    """All metrics of one task, computed over everything that was added.

    An ordinary `evaluate.Metric`: pass all predictions to `compute`, or call `add_batch` and then `compute`. Unlike
    `evaluate.load`, it downloads nothing and writes no file.

    * `accuracy`: share of predictions that equal their label.
    * `f1`: F1 of class 1. For MultiRC that is F1 over all answers of all questions.
    * `f1_macro`: mean F1 of the classes that occur (CommitmentBank).
    * `matthews`: Matthews correlation coefficient.
    * `pearson`, `spearman`: correlation coefficients; 0 where they are undefined, because all predictions or all
      labels are equal.
    * `mse`: mean squared error.
    * `exact_match`: share of questions with every answer right; `compute` needs `groups`, one key for each example.

    Args:
        task: A task, or the name of a GLUE or SuperGLUE task.
        **kwargs: Options of `evaluate.Metric`. `keep_in_memory` is on by default.

    Raises:
        ConfigError: For a task with custom metrics, and for kinds other than `single_label`, `multiple_choice` and a
            regression of one number.

    Examples:
        >>> TaskMetric("mrpc").compute(predictions=[1, 1, 0], references=[1, 0, 0])["accuracy"]
        0.6666666666666666
    """

    def __init__(self, task: str | Task, **kwargs: Any) -> None:
        self.task = get_task(task) if isinstance(task, str) else task
        numbers = self.task.kind == "regression"
        if self.task.kind not in ("single_label", "multiple_choice", "regression") or (
            numbers and self.task.num_labels != 1
        ):
            raise ConfigError(f"task {self.task.name!r} is {self.task.kind}: use EncodedTask.score.")
        if not all(isinstance(metric, str) for metric in self.task.metrics):
            raise ConfigError(f"task {self.task.name!r} has custom metrics: use EncodedTask.score.")
        kwargs.setdefault("keep_in_memory", True)
        super().__init__(config_name=self.task.name, **kwargs)

    def _build_data_dir(self) -> str:
        # `evaluate` creates a folder in the user's cache even for a metric that lives in memory.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float64" if self.task.kind == "regression" else "int64")
        return evaluate.MetricInfo(
            description=f"Metrics of {self.task.full_name}: {', '.join(map(str, self.task.metrics))}.",
            citation="",
            inputs_description="Args: predictions and references, one number for each example.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        groups: Sequence[Hashable] | None = None,
    ) -> dict[str, float]:
        names = [metric for metric in self.task.metrics if isinstance(metric, str)]
        return score_labels(self.task.name, names, np.asarray(predictions), np.asarray(references), groups=groups)
