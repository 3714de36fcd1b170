"""The scores of the predictions of a task."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.metrics import builtin
from pal_adapters.multitask.metrics.custom import SplitMetric, score_custom
from pal_adapters.multitask.model.heads import IGNORED

from .task import Task


def score_predictions(
    task: Task, rows: datasets.Dataset, predicted: Any, true: Any, logits: np.ndarray | None
) -> dict[str, float]:
    """All scores of a task, those of its first metric first.

    Args:
        task: The task.
        rows: The examples.
        predicted: Their predictions, see `EncodedTask.predictions`.
        true: Their labels in the same form; for questions, the texts of all correct answers.
        logits: Their logits; `None` if only the names of the scores matter.

    Raises:
        ConfigError: If two metrics return scores of the same name, or a custom metric cannot be computed.
    """
    if task.kind == "token_tagging":
        kept = [[tag != IGNORED for tag in tags] for tags in true]
        predicted, true = (
            [
                [tag for tag, keep in zip(tags, keeps, strict=True) if keep]
                for tags, keeps in zip(part, kept, strict=True)
            ]
            for part in (predicted, true)
        )
    scored: dict[str, float] = {}
    for metric in task.metrics:
        if isinstance(metric, str):
            found = {metric: _built_in(task, metric, rows, predicted, true)}
        elif isinstance(metric, SplitMetric):
            found = dict.fromkeys(metric.gives, 0.0) if logits is None else metric.compute(rows, logits)
        else:
            answers = rows[task.label_column][:] if task.kind == "span_qa" else None
            found = score_custom(
                metric, predicted, true, kind=task.kind, label_names=task.label_names, answers=answers
            )
        if "loss" in found:
            raise ConfigError(
                f"task {task.name!r}: a metric returns a score called 'loss', the name of the mean loss."
            )
        twice = sorted(scored.keys() & found.keys())
        if twice:
            raise ConfigError(
                f"task {task.name!r}: two metrics give a score called {twice[0]!r}: use functions that return scores "
                "with their own names."
            )
        scored |= found
    return scored


def _built_in(task: Task, metric: str, rows: datasets.Dataset, predicted: Any, true: Any) -> float:
    if task.kind == "token_tagging":
        return builtin.score_tags([metric], predicted, true, task.label_names)[metric]
    if task.kind == "span_qa":
        return builtin.score_answers([metric], predicted, true)[metric]
    if task.kind == "multi_label":
        return builtin.score_label_sets([metric], predicted, true)[metric]
    groups = None
    if metric == "exact_match":
        groups = list(zip(*(rows[column][:] for column in task.group_columns), strict=True))
    return builtin.score_labels(task.name, [metric], predicted, true, groups=groups)[metric]
