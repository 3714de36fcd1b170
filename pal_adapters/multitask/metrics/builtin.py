"""The built-in metrics of every kind of task, computed from predictions and labels."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

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

NOT_PREDICTED = -100
"""The prediction for a word that the model never saw; it is wrong whatever the label."""


def default_metrics(kind: str, num_labels: int | None = None) -> tuple[str, ...]:
    """The metrics that a task of a kind reports by default."""
    every = METRICS[kind]
    if kind == "regression" and (num_labels or 1) > 1:
        return ("mse",)
    return every[:1] if kind == "single_label" else every[:2]


def metric_problem(metric: str, kind: str, num_labels: int | None, grouped: bool) -> str:
    """Why a metric cannot be computed for a task, and what to do about it; empty if it can."""
    if metric not in METRICS[kind]:
        return f"is not one of {kind}: {', '.join(METRICS[kind])}"
    count = num_labels or 0
    if kind == "single_label" and metric == "f1" and count > 2:
        return f"is for two classes, but the task has {count}: use 'f1_macro'"
    if kind == "single_label" and metric == "exact_match" and not grouped:
        return "needs group_columns: name the columns that tell which examples belong to one question"
    if kind == "regression" and metric in ("pearson", "spearman") and count > 1:
        return f"is for one number, but the task has {count}: use 'mse'"
    return ""


_LESS_IS_BETTER = ("perplexity", "mse", "rmse", "mae", "mape", "smape", "mase", "wer", "cer", "loss")


def lower_is_better(metric: str) -> bool:
    """Whether lower values of a metric are better, judged by the last word of its name, as in `eval_stsb_mse`."""
    return metric.rsplit("_", 1)[-1] in _LESS_IS_BETTER


def score_labels(
    task: str,
    names: Sequence[str],
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """Metrics of single labels, choices and numbers; see `TaskMetric` for what each means.

    Args:
        task: Name of the task, for error messages.
        names: Names of the metrics.
        predicted: Predicted classes or numbers, one for each example.
        true: The labels, likewise.
        groups: One key for each example, equal within a question, for `exact_match`.

    Raises:
        ValueError: For predictions that are not finite, and for `exact_match` without `groups`.
    """
    if not np.isfinite(predicted).all():
        raise ValueError(f"task {task!r}: the predictions contain NaN or infinite values")
    scores: dict[str, float] = {}
    for name in names:
        if name == "accuracy":
            value = accuracy_score(true, predicted)
        elif name == "f1":
            value = f1_score(true, predicted, average="binary", pos_label=1, zero_division=0.0)
        elif name == "f1_macro":
            value = f1_score(true, predicted, average="macro", zero_division=0.0)
        elif name == "matthews":
            value = matthews_corrcoef(true, predicted)
        elif name == "mse":
            value = np.mean((predicted - true) ** 2)
        elif name == "exact_match":
            value = _exact_match(predicted, true, groups)
        else:
            value = _correlation(name, predicted, true)
        scores[name] = float(value)
    return scores


def _exact_match(predicted: np.ndarray, true: np.ndarray, groups: Sequence[Hashable] | None) -> float:
    if groups is None or len(groups) != len(true):
        got = "none" if groups is None else str(len(groups))
        raise ValueError(f"exact_match needs groups, one key for each of the {len(true)} examples; got {got}")
    right: dict[Hashable, bool] = defaultdict(lambda: True)
    for group, equal in zip(groups, predicted == true, strict=True):
        right[group] &= bool(equal)
    return sum(right.values()) / len(right)


def _correlation(name: str, predicted: np.ndarray, true: np.ndarray) -> float:
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0
    return float((pearsonr if name == "pearson" else spearmanr)(predicted, true)[0])


def score_label_sets(names: Sequence[str], predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Metrics of label sets, each `[b, c]` of zeros and ones."""
    scores = {
        "f1_micro": f1_score(true, predicted, average="micro", zero_division=0.0),
        "f1_macro": f1_score(true, predicted, average="macro", zero_division=0.0),
        "accuracy": (true == predicted).all(axis=1).mean(),
    }
    return {name: float(scores[name]) for name in names}


def score_tags(
    names: Sequence[str], predicted: Sequence[Sequence[int]], true: Sequence[Sequence[int]], labels: Sequence[str]
) -> dict[str, float]:
    """Metrics of tags, with `NOT_PREDICTED` for words that have no prediction.

    F1 is over entities if there are labels like `B-PER`, and otherwise the mean F1 of the classes that occur.
    """
    flat = [np.asarray([tag for row in rows for tag in row], dtype=int) for rows in (predicted, true)]
    scores = {"accuracy": float((flat[0] == flat[1]).mean()) if len(flat[1]) else 0.0}
    if any(re.match(r"[BI]-", label) for label in labels):
        found = []
        for rows in (predicted, true):
            named = (["O" if tag == NOT_PREDICTED else labels[tag] for tag in row] for row in rows)
            found.append({(number, *entity) for number, row in enumerate(named) for entity in entities(row)})
        hits, total = len(found[0] & found[1]), len(found[0]) + len(found[1])
        scores["f1"] = 2 * hits / total if total else 0.0
    else:
        occurring = sorted({*flat[0].tolist(), *flat[1].tolist()} - {NOT_PREDICTED})
        scores["f1"] = float(
            f1_score(flat[1], flat[0], labels=occurring, average="macro", zero_division=0.0) if occurring else 0.0
        )
    return {name: scores[name] for name in names}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities of a tag sequence such as `B-PER I-PER O`: type, first word, index after the last word.

    An `I-` that does not continue an entity begins one, as in `conlleval`.
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
    """Metrics of answers: the best over all correct answers to a question, ignoring articles and punctuation."""
    pairs = list(zip(predicted, true, strict=True))
    scores = {
        "exact_match": [max(float(plain(text) == plain(right)) for right in rights or [""]) for text, rights in pairs],
        "f1": [max(overlap(text, right) for right in rights or [""]) for text, rights in pairs],
    }
    return {name: float(np.mean(scores[name])) for name in names}


def plain(text: str) -> str:
    """A text in lower case, without punctuation, articles or double spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def overlap(text: str, right: str) -> float:
    """Word F1 of two texts."""
    words, wanted = plain(text).split(), plain(right).split()
    if not words or not wanted:
        return float(words == wanted)
    hits = sum((Counter(words) & Counter(wanted)).values())
    return 2 * hits / (len(words) + len(wanted))
