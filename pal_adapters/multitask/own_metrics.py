"""Metrics of one's own: functions, and objects of `evaluate`, which are given what they ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import evaluate
import numpy as np

from pal_adapters.errors import ConfigError

Metric = Callable[..., Any] | Any
"""A metric of one's own: of `evaluate`, or a function of predictions and references for a number or a dict."""


def metric_name(metric: str | Metric) -> str:
    """Under which name a metric is reported."""
    if isinstance(metric, str):
        return metric
    return str(getattr(metric, "__name__", None) or getattr(metric, "name", "score"))


def flat_metrics(metrics: Sequence[str | Metric]) -> tuple[str | Metric, ...]:
    """The metrics, those of `evaluate.combine` one by one."""
    found: list[str | Metric] = []
    for metric in metrics:
        found += metric.evaluation_modules if isinstance(metric, evaluate.CombinedEvaluations) else [metric]
    return tuple(found)


def own_metric_problem(metric: Metric, kind: str, label_names: Sequence[str]) -> str:
    """Why a metric of one's own cannot be computed for a task, and what to do; nothing if it can."""
    if not isinstance(metric, evaluate.EvaluationModule):
        return "" if callable(metric) else "is neither a name, nor a function, nor an object of evaluate"
    wanted = _predictions(metric)
    if isinstance(wanted, Mapping):
        return "" if kind == "span_qa" and "prediction_text" in wanted else f"asks for {sorted(wanted)}"
    if kind in ("single_label", "multiple_choice", "token_tagging") and _dtype(wanted) == "string" and not label_names:
        return "asks for names of classes: give label_names"
    return ""


def score_own(
    metric: Metric, predicted: Any, true: Any, *, kind: str, label_names: Sequence[str] = (), answers: Any = None
) -> dict[str, float]:
    """What a metric of one's own gives; what is nested in it by names joined with `_`.

    Args:
        metric: The metric.
        predicted: What is predicted, see `EncodedTask.predictions`.
        true: The labels, likewise; of questions the texts of all right answers.
        kind: Kind of the task.
        label_names: Names of its classes.
        answers: Of questions the labels as they are, a dict each.
    """
    if not isinstance(metric, evaluate.EvaluationModule):
        return _plain(metric, metric(predicted, true))
    wanted = _predictions(metric)
    if isinstance(wanted, Mapping):
        more = {"no_answer_probability": 0.0} if "no_answer_probability" in wanted else {}
        predicted = [{"id": str(row), "prediction_text": text, **more} for row, text in enumerate(predicted)]
        true = [{"id": str(row), "answers": dict(answer)} for row, answer in enumerate(answers)]
    if kind == "token_tagging" and not _is_list(wanted):
        predicted, true = ([tag for row in rows for tag in row] for rows in (predicted, true))
    if kind in ("single_label", "multiple_choice", "token_tagging") and _dtype(wanted) == "string":
        predicted, true = _named(predicted, label_names), _named(true, label_names)
    return _plain(metric, metric.compute(predictions=predicted, references=true))


def primary_name(metric: str | Metric, found: Mapping[str, float]) -> str:
    """The score of a metric that models are chosen by: of its name, else `overall_f1` (seqeval), else the first."""
    return next((name for name in (metric_name(metric), "overall_f1") if name in found), next(iter(found)))


def _predictions(metric: evaluate.EvaluationModule) -> Any:
    """The form in which a metric wants predictions; the first of several."""
    features: Any = metric.features
    return (features[0] if isinstance(features, list) else features)["predictions"]


def _is_list(feature: Any) -> bool:
    return isinstance(feature, list) or hasattr(feature, "feature")


def _dtype(feature: Any) -> str:
    while _is_list(feature):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return str(getattr(feature, "dtype", ""))


def _named(values: Any, names: Sequence[str]) -> Any:
    if isinstance(values, (list, np.ndarray)):
        return [_named(value, names) for value in values]
    return names[int(values)]


def _plain(metric: Metric, given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        given = {metric_name(metric): given}
    found: dict[str, float] = {}
    for name, value in given.items():
        inner = _plain(metric, value) if isinstance(value, Mapping) else {"": value}
        for key, number in inner.items():
            try:
                found[f"{name}_{key}" if key else str(name)] = float(number)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"metric {metric_name(metric)!r} gives {name}={value!r:.60}, which is no number: use a function "
                    "that makes one of it."
                ) from error
    return found
