"""The metrics of the tasks, as the benchmarks define them, without a download."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pal_adapters.multitask.tasks.glue import TaskSpec, get_task


class TaskMetric(evaluate.Metric):
    """All metrics of one task, computed on everything that was added.

    An ordinary `evaluate.Metric`: give all predictions to `compute`, or call `add_batch` and then `compute`. It is
    made here rather than with `evaluate.load`, so nothing is fetched and no file is written.

    * `accuracy`: share of equal labels.
    * `f1`: F1 of class 1. For MultiRC that is F1 over all answers of all questions.
    * `f1_macro`: mean of the F1 of the classes that occur (CommitmentBank).
    * `matthews`: Matthews correlation coefficient.
    * `pearson`, `spearman`: correlation coefficients. 0 where they are undefined, that is when the predictions or
      the labels are all equal.
    * `exact_match`: share of questions with every answer right; `compute` needs `groups`, one key for each row.

    Args:
        task: A task or its name.
        **kwargs: Options of `evaluate.Metric`. `keep_in_memory` is on unless set.

    Example:
        >>> TaskMetric("mrpc").compute(predictions=[1, 1, 0], references=[1, 0, 0])["accuracy"]
        0.6666666666666666
    """

    def __init__(self, task: str | TaskSpec, **kwargs: Any) -> None:
        self.task = get_task(task) if isinstance(task, str) else task
        kwargs.setdefault("keep_in_memory", True)
        super().__init__(config_name=self.task.name, **kwargs)

    def _build_data_dir(self) -> str:
        # The host makes a folder in the user's cache even for a metric that lives in memory.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float64" if self.task.is_regression else "int64")
        return evaluate.MetricInfo(
            description=f"Metrics of {self.task.full_name}: {', '.join(self.task.metrics)}.",
            citation="",
            inputs_description="Args: predictions and references, one number for each row.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        groups: Sequence[Hashable] | None = None,
    ) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        if not np.isfinite(predicted).all():
            raise ValueError(f"predictions of {self.task.name} hold NaN or infinite values")
        scores: dict[str, float] = {}
        for name in self.task.metrics:
            if name == "accuracy":
                value = accuracy_score(true, predicted)
            elif name == "f1":
                value = f1_score(true, predicted, average="binary", pos_label=1, zero_division=0.0)
            elif name == "f1_macro":
                value = f1_score(true, predicted, average="macro", zero_division=0.0)
            elif name == "matthews":
                value = matthews_corrcoef(true, predicted)
            elif name == "exact_match":
                value = _exact_match(predicted, true, groups)
            else:
                value = _correlation(name, predicted, true)
            scores[name] = float(value)
        return scores


def _exact_match(predicted: np.ndarray, true: np.ndarray, groups: Sequence[Hashable] | None) -> float:
    if groups is None or len(groups) != len(true):
        got = "none" if groups is None else str(len(groups))
        raise ValueError(f"exact_match needs groups, one key for each of the {len(true)} rows; got {got}")
    right: dict[Hashable, bool] = defaultdict(lambda: True)
    for group, equal in zip(groups, predicted == true, strict=True):
        right[group] &= bool(equal)
    return sum(right.values()) / len(right)


def _correlation(name: str, predicted: np.ndarray, true: np.ndarray) -> float:
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0
    return float((pearsonr if name == "pearson" else spearmanr)(predicted, true)[0])
