"""Custom metrics: functions, and metrics of `evaluate`, each given its input in the form it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np

from pal_adapters.errors import ConfigError

from .builtin import NOT_PREDICTED

Metric = Callable[..., Any] | Any
"""A custom metric: one of `evaluate`, or a function of predictions and references that returns a number or a dict."""


@dataclass(frozen=True)
class SplitMetric:
    """A metric that needs the columns of a whole split and the logits, rather than predictions and labels.

    Args:
        name: Name of the metric.
        gives: Names of the scores that it returns.
        compute: Scores of the examples of a split (a `datasets.Dataset`) and their logits.
    """

    name: str
    gives: tuple[str, ...]
    compute: Callable[[Any, np.ndarray], dict[str, float]]


def metric_name(metric: str | Metric) -> str:
    """The name that a metric is reported under."""
    if isinstance(metric, str):
        return metric
    return str(getattr(metric, "__name__", None) or getattr(metric, "name", "score"))


def flat_metrics(metrics: Sequence[str | Metric]) -> tuple[str | Metric, ...]:
    """The metrics, with those of `evaluate.combine` unpacked."""
    found: list[str | Metric] = []
    for metric in metrics:
        found += metric.evaluation_modules if isinstance(metric, evaluate.CombinedEvaluations) else [metric]
    return tuple(found)


def custom_metric_problem(metric: Metric, kind: str, num_labels: int | None, label_names: Sequence[str]) -> str:
    """Why a custom metric cannot be computed for a task, and what to do about it; empty if it can."""
    if kind == "language_modeling":
        return "has nothing to compare: a language model only has its perplexity"
    if not isinstance(metric, evaluate.EvaluationModule):
        return (
            ""
            if callable(metric) or isinstance(metric, SplitMetric)
            else "is neither a name, nor a function, nor a metric of evaluate"
        )
    forms = _forms(metric)
    if any("predictions" not in form for form in forms):
        return f"asks for {sorted(forms[0])}, not for predictions: use a function"
    wanted = forms[0]["predictions"]
    if isinstance(wanted, Mapping):
        return "" if kind == "span_qa" and "prediction_text" in wanted else f"asks for {sorted(wanted)}"
    if kind == "span_qa":
        return "asks for one correct answer, but a question may have several: use 'exact_match', or squad of evaluate"
    lists = kind == "multi_label" or (kind == "regression" and (num_labels or 1) > 1)
    if kind != "token_tagging" and all(_is_list(form["predictions"]) is not lists for form in forms):
        how = " (accuracy and f1 do with config_name='multilabel')" if kind == "multi_label" else ""
        asked, given = ("a value", "a list") if lists else ("a list", "a value")
        return f"asks for {asked} for each example, not {given}{how}"
    if _dtype(wanted) == "string" and (kind == "multi_label" or kind == "regression"):
        return f"asks for texts, which {kind} does not have"
    if _dtype(wanted) == "string" and not label_names:
        return "asks for class names: give label_names"
    return ""


def score_custom(
    metric: Metric, predicted: Any, true: Any, *, kind: str, label_names: Sequence[str] = (), answers: Any = None
) -> dict[str, float]:
    """The scores of a custom metric; names of nested scores are joined with `_`.

    Args:
        metric: The metric.
        predicted: The predictions, see `EncodedTask.predictions`.
        true: The labels in the same form; for questions, the texts of all correct answers.
        kind: Kind of the task.
        label_names: Names of its classes.
        answers: For questions, the labels themselves, a dict each.

    Raises:
        ConfigError: If a metric of `evaluate` cannot be computed, or a metric returns anything but numbers.
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
    """Predicted and correct answers in the form of `squad` and `squad_v2` of `evaluate`; "" means no answer."""
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
    """The score that selects the best checkpoint, of those that a metric returned.

    It is the one named after the metric, else `overall_f1` (of seqeval), else the first.
    """
    return next((name for name in (metric_name(metric), "overall_f1") if name in found), next(iter(found)))


def _forms(metric: evaluate.EvaluationModule) -> list[Mapping[str, Any]]:
    """The forms in which a metric accepts its input."""
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
    return "O" if values == NOT_PREDICTED else names[int(values)]


def _plain(metric: Metric, given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        given = {metric_name(metric): given}
    found: dict[str, float] = {}
    for name, value in given.items():
        inner = _plain(metric, value) if isinstance(value, Mapping) else {"": value}
        for key, number in inner.items():
            whole = f"{name}_{key}" if key else str(name)
            if whole in found:
                raise ConfigError(f"metric {metric_name(metric)!r} returns two scores called {whole!r}.")
            try:
                found[whole] = float(number)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"metric {metric_name(metric)!r} returns {name}={value!r:.60}, which is not a number: use a "
                    "function that converts it."
                ) from error
    return found
