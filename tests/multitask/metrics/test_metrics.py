from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np
import pytest
from transformers import AutoTokenizer

from pal_adapters.multitask import EncodedTask, Task, TaskMetric
from pal_adapters.multitask.tasks.task import get_task

TRUE = [1, 1, 1, 0, 0, 1, 0, 1]
GUESS = [1, 0, 1, 0, 1, 1, 0, 0]
# By hand: 3 true positives, 1 false positive, 2 true negatives, 2 false negatives.
TP, FP, TN, FN = 3, 1, 2, 2


def test_it_is_a_metric_of_evaluate() -> None:
    metric = TaskMetric("rte")
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == "task_metric"
    assert set(metric.features) == {"predictions", "references"}


@pytest.mark.parametrize("task", ["rte", "qnli", "sst2", "wnli", "boolq", "copa", "wic", "wsc", "super_glue/rte"])
def test_accuracy_alone(task: str) -> None:
    assert TaskMetric(task).compute(predictions=GUESS, references=TRUE) == {"accuracy": (TP + TN) / 8}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_accuracy_and_f1(task: str) -> None:
    scores = TaskMetric(task).compute(predictions=GUESS, references=TRUE)
    assert scores == {"accuracy": 5 / 8, "f1": pytest.approx(2 * TP / (2 * TP + FP + FN))}


def test_matthews() -> None:
    expected = (TP * TN - FP * FN) / math.sqrt((TP + FP) * (TP + FN) * (TN + FP) * (TN + FN))
    assert TaskMetric("cola").compute(predictions=GUESS, references=TRUE) == {"matthews": pytest.approx(expected)}
    assert TaskMetric("cola").compute(predictions=[1] * 8, references=TRUE) == {"matthews": 0.0}


def test_correlations() -> None:
    x, y = np.array([0.5, 4.0, 2.0, 3.0, 1.0]), np.array([1.0, 5.0, 0.0, 2.5, 2.0])
    a, b = x - x.mean(), y - y.mean()
    pearson = (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())
    # Ranks of x: 0 4 2 3 1; of y: 1 4 0 3 2; squared differences 1 0 4 0 1.
    spearman = 1 - 6 * 6 / (5 * 24)
    assert TaskMetric("stsb").compute(predictions=x.tolist(), references=y.tolist()) == {
        "pearson": pytest.approx(pearson),
        "spearman": pytest.approx(spearman),
    }


def test_equal_predictions_correlate_with_nothing() -> None:
    scores = TaskMetric("stsb").compute(predictions=[2.5, 2.5, 2.5], references=[0.0, 1.0, 5.0])
    assert scores == {"pearson": 0.0, "spearman": 0.0}


def test_regression_is_not_rounded() -> None:
    close = TaskMetric("stsb").compute(predictions=[0.1, 0.2, 0.4], references=[0.1, 0.2, 0.4])
    assert close["pearson"] == pytest.approx(1.0)


def test_macro_f1_of_commitmentbank() -> None:
    scores = TaskMetric("cb").compute(predictions=[0, 0, 1, 2], references=[0, 1, 1, 2])
    assert scores == {"accuracy": 0.75, "f1_macro": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}
    assert TaskMetric("mnli").compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


def test_multirc_counts_answers_and_whole_questions() -> None:
    # Two of three questions have every answer right.
    groups = ["a", "a", "b", "b", "b", "c"]
    scores = TaskMetric("multirc").compute(
        predictions=[1, 0, 1, 1, 0, 0], references=[1, 0, 1, 0, 0, 0], groups=groups
    )
    assert scores == {"f1": pytest.approx(2 * 2 / (2 * 2 + 1)), "exact_match": pytest.approx(2 / 3),
                      "accuracy": pytest.approx(5 / 6)}  # fmt: skip


def test_multirc_needs_groups() -> None:
    with pytest.raises(ValueError, match="groups, one key for each of the 2 examples; got none"):
        TaskMetric("multirc").compute(predictions=[1, 0], references=[1, 0])
    with pytest.raises(ValueError, match="got 1"):
        TaskMetric("multirc").compute(predictions=[1, 0], references=[1, 0], groups=["a"])


def test_f1_without_a_positive_is_zero() -> None:
    assert TaskMetric("mrpc").compute(predictions=[0, 0], references=[1, 0])["f1"] == 0.0


def test_numbers_of_several_are_scored_by_their_squared_error(tiny_encoder: str) -> None:
    rows = datasets.Dataset.from_dict({"text": ["the", "is"], "label": [[1.0, 2.0], [0.0, 3.0]]})
    task = Task("two", {"train": rows}, kind="regression", text_columns="text", num_labels=2)
    assert task.metrics == ("mse",)
    encoded = EncodedTask(task, rows, AutoTokenizer.from_pretrained(tiny_encoder), 16)
    assert encoded.score(np.array([[1.0, 4.0], [1.0, 3.0]])) == {"mse": pytest.approx((0 + 4 + 1 + 0) / 4)}
    one = Task("one", {"train": rows}, kind="regression", text_columns="text", metrics=("spearman", "mse"))
    assert one.metrics == ("spearman", "mse")


def test_batches_are_scored_together() -> None:
    """F1 of the whole is not the mean of the F1 of its parts."""
    metric = TaskMetric("mrpc")
    for start in (0, 3, 6):
        metric.add_batch(predictions=GUESS[start : start + 3], references=TRUE[start : start + 3])
    assert metric.compute() == TaskMetric("mrpc").compute(predictions=GUESS, references=TRUE)


def test_a_metric_can_be_used_twice() -> None:
    metric = TaskMetric(get_task("rte"))
    assert metric.compute(predictions=[1, 1], references=[1, 0]) == {"accuracy": 0.5}
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1.0}


def test_predictions_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="task 'stsb': the predictions contain NaN"):
        TaskMetric("stsb").compute(predictions=[float("nan"), 1.0], references=[0.0, 1.0])


def test_nothing_is_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    TaskMetric("rte").compute(predictions=[1], references=[1])
    assert not (tmp_path / "cache").exists()
