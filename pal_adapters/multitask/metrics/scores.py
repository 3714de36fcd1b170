"""Scores of the predictions of a task of any kind."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import f1_score

from pal_adapters.multitask.tasks.glue import TaskSpec

from .glue import TaskMetric

METRICS: dict[str, tuple[str, ...]] = {
    "single_label": ("accuracy", "f1", "f1_macro", "matthews", "exact_match"),
    "multiple_choice": ("accuracy",),
    "regression": ("pearson", "spearman", "mse"),
    "multi_label": ("f1_micro", "f1_macro", "accuracy"),
    "token_tagging": ("f1", "accuracy"),
    "span_qa": ("f1", "exact_match"),
    "language_modeling": ("perplexity",),
}
"""Names of metrics by kind of task."""


def default_metrics(kind: str, num_labels: int | None = None) -> tuple[str, ...]:
    """The metrics that a task of a kind reports unless told otherwise."""
    every = METRICS[kind]
    if kind == "regression" and (num_labels or 1) > 1:
        return ("mse",)
    return every[:1] if kind == "single_label" else every[:2]


def metric_problem(metric: str, kind: str, num_labels: int | None, grouped: bool) -> str:
    """Why a metric cannot be computed for a task, and what to do; nothing if it can."""
    if metric not in METRICS[kind]:
        return f"is not one of {kind}: {', '.join(METRICS[kind])}"
    count = num_labels or 0
    if kind == "single_label" and metric == "f1" and count > 2:
        return f"is of two classes, but the task has {count}: use 'f1_macro'"
    if kind == "single_label" and metric == "exact_match" and not grouped:
        return "needs group_columns: name the columns that say which rows belong to one question"
    if kind == "regression" and metric in ("pearson", "spearman") and count > 1:
        return f"is of one number, but the task has {count}: use 'mse'"
    return ""


_LESS_IS_BETTER = ("perplexity", "mse", "rmse", "mae", "mape", "smape", "mase", "wer", "cer", "loss")


def lower_is_better(metric: str) -> bool:
    """Whether a small value of a metric is good: the last word of its name says so, as in `eval_stsb_mse`."""
    return metric.rsplit("_", 1)[-1] in _LESS_IS_BETTER


def score_rows(
    name: str,
    names: Sequence[str],
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    groups: Sequence[Any] | None,
    numbers: bool,
) -> dict[str, float]:
    """Metrics of single labels, choices and numbers, through an `evaluate.Metric`."""
    ours = [metric for metric in names if metric != "mse"]
    scores: dict[str, float] = {}
    if ours:
        spec = TaskSpec(name, "toy", (), num_labels=1 if numbers else 2, metrics=tuple(ours))
        options = {} if groups is None else {"groups": groups}
        scores = TaskMetric(spec).compute(predictions=predicted, references=true, **options)
    if "mse" in names:
        scores["mse"] = float(np.mean((predicted - true) ** 2))
    return {metric: scores[metric] for metric in names}


def score_label_sets(names: Sequence[str], predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Metrics of sets of labels, each `[rows, c]` of 0 and 1."""
    scores = {
        "f1_micro": f1_score(true, predicted, average="micro", zero_division=0.0),
        "f1_macro": f1_score(true, predicted, average="macro", zero_division=0.0),
        "accuracy": (true == predicted).all(axis=1).mean(),
    }
    return {name: float(scores[name]) for name in names}


def score_tags(
    names: Sequence[str], predicted: Sequence[Sequence[int]], true: Sequence[Sequence[int]], labels: Sequence[str]
) -> dict[str, float]:
    """Metrics of tags. F1 is of whole entities if labels are called like `B-PER`, else the mean F1 of the classes."""
    flat = [np.asarray([tag for row in rows for tag in row], dtype=int) for rows in (predicted, true)]
    scores = {"accuracy": float((flat[0] == flat[1]).mean()) if len(flat[1]) else 0.0}
    if any(re.match(r"[BI]-", label) for label in labels):
        found = []
        for rows in (predicted, true):
            named = ([labels[tag] for tag in row] for row in rows)
            found.append({(number, *entity) for number, row in enumerate(named) for entity in entities(row)})
        hits, total = len(found[0] & found[1]), len(found[0]) + len(found[1])
        scores["f1"] = 2 * hits / total if total else 0.0
    else:
        scores["f1"] = float(f1_score(flat[1], flat[0], average="macro", zero_division=0.0))
    return {name: scores[name] for name in names}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities of a row of tags such as `B-PER I-PER O`: kind, first word, word behind the last.

    An `I-` that does not go on begins an entity, as in the usual evaluation script.
    """
    found: list[tuple[str, int, int]] = []
    for number, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "I" and found and found[-1][2] == number and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1], number + 1)
        elif prefix in ("B", "I"):
            found.append((kind, number, number + 1))
    return found


def score_answers(names: Sequence[str], predicted: Sequence[str], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Metrics of answers: the best over all right ones of a question, after articles and punctuation are dropped."""
    pairs = list(zip(predicted, true, strict=True))
    scores = {
        "exact_match": [max(float(plain(text) == plain(right)) for right in rights or [""]) for text, rights in pairs],
        "f1": [max(overlap(text, right) for right in rights or [""]) for text, rights in pairs],
    }
    return {name: float(np.mean(scores[name])) for name in names}


def plain(text: str) -> str:
    """A text in lower case, without punctuation, articles and double spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def overlap(text: str, right: str) -> float:
    """F1 of the words of two texts."""
    words, wanted = plain(text).split(), plain(right).split()
    if not words or not wanted:
        return float(words == wanted)
    hits = sum((Counter(words) & Counter(wanted)).values())
    return 2 * hits / (len(words) + len(wanted))
