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


def own_metric_problem(metric: Metric, kind: str, num_labels: int | None, label_names: Sequence[str]) -> str:
    """Why a metric of one's own cannot be computed for a task, and what to do; nothing if it can."""
    if kind == "language_modeling":
        return "has nothing to compare: a language model has its perplexity alone"
    if not isinstance(metric, evaluate.EvaluationModule):
        return "" if callable(metric) else "is neither a name, nor a function, nor an object of evaluate"
    forms = _forms(metric)
    if any("predictions" not in form for form in forms):
        return f"asks for {sorted(forms[0])}, not for predictions: use a function"
    wanted = forms[0]["predictions"]
    if isinstance(wanted, Mapping):
        return "" if kind == "span_qa" and "prediction_text" in wanted else f"asks for {sorted(wanted)}"
    if kind == "span_qa":
        return "asks for one right answer, of which questions may have more: use 'exact_match', or squad of evaluate"
    lists = kind == "multi_label" or (kind == "regression" and (num_labels or 1) > 1)
    if kind != "token_tagging" and all(_is_list(form["predictions"]) is not lists for form in forms):
        how = " (accuracy and f1 do with config_name='multilabel')" if kind == "multi_label" else ""
        return f"asks for {'a value' if lists else 'a list'} for each row, not {'a list' if lists else 'a value'}{how}"
    if _dtype(wanted) == "string" and (kind == "multi_label" or kind == "regression"):
        return f"asks for texts, which {kind} has not"
    if _dtype(wanted) == "string" and not label_names:
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

    Raises:
        ConfigError: If the metric of `evaluate` cannot be computed, or what a metric gives is no number.
    """
    if not isinstance(metric, evaluate.EvaluationModule):
        return _plain(metric, metric(predicted, true))
    name, forms = metric_name(metric), _forms(metric)
    wanted = forms[0]["predictions"]
    if isinstance(wanted, Mapping):
        predicted, true = _questions(name, wanted, predicted, answers)
    if kind == "token_tagging" and not any(_is_list(form["predictions"]) for form in forms):
        predicted, true = ([tag for row in rows for tag in row] for rows in (predicted, true))
    if kind in ("single_label", "multiple_choice", "token_tagging") and _dtype(wanted) == "string":
        predicted, true = _named(predicted, label_names), _named(true, label_names)
    try:
        given = metric.compute(predictions=predicted, references=true)
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"metric {name!r} cannot be computed ({reason:.200}): use a function that calls it with what it needs."
        ) from error
    return _plain(metric, given)


def _questions(name: str, wanted: Mapping[str, Any], predicted: Sequence[str], answers: Sequence[Any]) -> Any:
    """Predicted and right answers as `squad` and `squad_v2` of `evaluate` want them; "" is no answer."""
    more = {"no_answer_probability": 0.0} if "no_answer_probability" in wanted else {}
    texts = [{"id": str(row), "prediction_text": text, **more} for row, text in enumerate(predicted)]
    right = []
    for row, answer in enumerate(answers):
        kept = [pair for pair in zip(answer["text"], answer["answer_start"], strict=True) if pair[0]]
        if not kept and not more:
            raise ConfigError(f"metric {name!r} cannot score row {row + 1}, which has no answer: use squad_v2.")
        text, start = (list(values) for values in zip(*kept, strict=True)) if kept else ([], [])
        right.append({"id": str(row), "answers": {"text": text, "answer_start": start}})
    return texts, right


def primary_name(metric: str | Metric, found: Mapping[str, float]) -> str:
    """Of the scores of a metric the one of its name, else `overall_f1` (seqeval), else the first."""
    return next((name for name in (metric_name(metric), "overall_f1") if name in found), next(iter(found)))


def _forms(metric: evaluate.EvaluationModule) -> list[Mapping[str, Any]]:
    """The forms in which a metric takes its input."""
    features: Any = metric.features
    return features if isinstance(features, list) else [features]


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
            whole = f"{name}_{key}" if key else str(name)
            if whole in found:
                raise ConfigError(f"metric {metric_name(metric)!r} gives two scores called {whole!r}.")
            try:
                found[whole] = float(number)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"metric {metric_name(metric)!r} gives {name}={value!r:.60}, which is no number: use a function "
                    "that makes one of it."
                ) from error
    return found
