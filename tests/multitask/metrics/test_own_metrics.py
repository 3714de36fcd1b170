"""Metrics of one's own get what they ask for, as the metrics on the hub declare it in their features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
from tiny_tasks import make_task, make_trainer
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import EncodedTask, Task

TEXT = datasets.Value("string")
ANSWERS = {"text": [TEXT], "answer_start": [datasets.Value("int32")]}
SHAPES: dict[str, dict[str, Any]] = {
    "classes": {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")},
    "names": {"predictions": TEXT, "references": TEXT},
    "sets": {"predictions": [datasets.Value("int32")], "references": [datasets.Value("int32")]},
    "roc_auc": {"prediction_scores": datasets.Value("float32"), "references": datasets.Value("int32")},
    "seqeval": {"predictions": [TEXT], "references": [TEXT]},
    "squad": {
        "predictions": {"id": TEXT, "prediction_text": TEXT},
        "references": {"id": TEXT, "answers": ANSWERS},
    },
    "squad_v2": {
        "predictions": {"id": TEXT, "prediction_text": TEXT, "no_answer_probability": datasets.Value("float32")},
        "references": {"id": TEXT, "answers": ANSWERS},
    },
}


class Recorder(evaluate.Metric):
    """Keeps what it was given, and gives what it was told to."""

    def __init__(self, shape: str, name: str = "own", result: Any = None, **kwargs: Any) -> None:
        self.shape, self.result = shape, {name: 0.5} if result is None else result
        self.seen: list[Any] = []
        super().__init__(keep_in_memory=True, **kwargs)
        self.info.module_name = name
        self.info.metric_name = name

    def _build_data_dir(self) -> str:
        return ""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(SHAPES[self.shape])
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any) -> Any:
        self.seen = [predictions, references]
        return self.result


def score(tiny_encoder: str, task: Task, logits: np.ndarray | None = None) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    rows = EncodedTask(task, task.dataset["validation"], tokenizer, 64)
    if logits is None:
        classes = {"token_tagging": 3, "span_qa": 2}.get(task.kind, task.num_labels or 1)
        shape = (
            (len(rows), int(rows.lengths().max()), classes) if task.kind != "single_label" else (len(rows), classes)
        )
        logits = np.random.default_rng(1).normal(size=shape)
    return rows.score(logits)


def test_words_of_tags(tiny_encoder: str) -> None:
    result = {"X": {"f1": 0.25, "number": np.int64(4)}, "overall_precision": 0.75, "overall_f1": np.float64(0.5)}
    metric = Recorder("seqeval", "seqeval", result)
    task = make_task("token_tagging", "ner", metrics=metric)
    assert task.metrics == (metric,)
    assert score(tiny_encoder, task) == {"X_f1": 0.25, "X_number": 4, "overall_precision": 0.75, "overall_f1": 0.5}
    names = ("O", "B-X", "I-X")
    assert metric.seen[1] == [[names[tag] for tag in row] for row in task.dataset["validation"]["tags"]]
    assert [len(row) for row in metric.seen[0]] == [len(row) for row in metric.seen[1]]
    assert {tag for row in metric.seen[0] for tag in row} <= set(names)


def test_tags_in_one_row(tiny_encoder: str) -> None:
    metric = Recorder("classes")
    task = make_task("token_tagging", "ner", metrics=[metric])
    score(tiny_encoder, task)
    assert metric.seen[1] == [tag for row in task.dataset["validation"]["tags"] for tag in row]


@pytest.mark.parametrize("shape", ["squad", "squad_v2"])
def test_answers_with_their_places(tiny_encoder: str, shape: str) -> None:
    metric = Recorder(shape, result={"exact_match": 50.0, "f1": 60.0})
    task = make_task("span_qa", "qa", metrics=[metric])
    assert score(tiny_encoder, task) == {"exact_match": 50.0, "f1": 60.0}
    predicted, true = metric.seen
    assert [row["answers"] for row in true] == task.dataset["validation"]["answers"][:]
    assert [row["id"] for row in predicted] == [row["id"] for row in true] == [str(n) for n in range(len(true))]
    contexts = task.dataset["validation"]["context"]
    assert all(row["prediction_text"] in context for row, context in zip(predicted, contexts, strict=True))
    assert [row.get("no_answer_probability") for row in predicted] == [0.0 if shape == "squad_v2" else None] * 5


def test_names_of_classes(tiny_encoder: str) -> None:
    metric = Recorder("names")
    task = make_task("single_label", "rte", metrics=[metric], label_names=("no", "yes"))
    score(tiny_encoder, task, np.eye(2)[[0, 1, 1, 0, 1]])
    assert metric.seen == [["no", "yes", "yes", "no", "yes"], ["no", "yes", "no", "yes", "no"]]


def test_combined_metrics_are_taken_one_by_one(tiny_encoder: str) -> None:
    one, two = Recorder("classes", "one", {"one": 0.25}), Recorder("classes", "two", {"two": 0.75})
    task = make_task("single_label", "rte", metrics=evaluate.CombinedEvaluations([one, two]))
    assert score(tiny_encoder, task) == {"one": 0.25, "two": 0.75}


def test_what_models_are_chosen_by(tiny_encoder: str, tmp_path: Path) -> None:
    metric = Recorder("seqeval", "seqeval", {"X": {"f1": 0.1}, "overall_f1": 0.7})
    made = make_trainer(tiny_encoder, tmp_path, tasks=[make_task("token_tagging", "ner", metrics=[metric])])
    found = made.evaluate()
    assert (found["eval_ner_X_f1"], found["eval_average"]) == (0.1, 0.7)
    made.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| ner | X_f1 | 0.1000 |" in card
    assert "| ner | overall_f1 | 0.7000 |" in card


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("single_label", {"metrics": [Recorder("names")]}, "metric 'own' asks for class names: give label_names"),
        ("single_label", {"metrics": [Recorder("squad")]}, r"metric 'own' asks for \['id', 'prediction_text'\]"),
        (
            "single_label",
            {"metrics": [Recorder("classes")] * 2},
            "two metrics are called 'own': give each its own name",
        ),
        ("single_label", {"metrics": ["accuracy", "accuracy"]}, "two metrics are called 'accuracy'"),
        ("single_label", {"metrics": [lambda p, r: 0.0, lambda p, r: 1.0]}, "two metrics are called '<lambda>'"),
        ("single_label", {"metrics": [Recorder("sets")]}, "asks for a list for each example, not a value"),
        (
            "multi_label",
            {"metrics": [Recorder("classes")]},
            r"asks for a value for each example, not a list \(accuracy",
        ),
        ("multi_label", {"metrics": [Recorder("seqeval")]}, "asks for texts, which multi_label does not have"),
        ("regression", {"metrics": [Recorder("names")]}, "asks for texts, which regression does not have"),
        ("span_qa", {"metrics": [Recorder("names")]}, "asks for one correct answer, but a question may have several"),
        ("single_label", {"metrics": [Recorder("roc_auc")]}, r"asks for \['prediction_scores', 'references'\], not"),
        ("language_modeling", {"metrics": [lambda p, r: 0.0]}, "has nothing to compare"),
        (
            "single_label",
            {"metrics": [3]},
            "metric 'score' is neither a name, nor a function, nor a metric of evaluate",
        ),
    ],
)
def test_metrics_that_do_not_fit(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(kind, "own", **changes)


def test_what_is_no_answer(tiny_encoder: str) -> None:
    rows = make_task("span_qa", "qa").dataset["validation"].to_list()
    rows[1]["answers"] = {"text": [], "answer_start": []}
    rows[2]["answers"] = {"text": [""], "answer_start": [0]}
    rows[3]["answers"] |= {"extra": ["of the data set"]}
    rows = [row | {"answers": {"extra": [], **row["answers"]}} for row in rows]
    data = {"train": datasets.Dataset.from_list(rows), "validation": datasets.Dataset.from_list(rows)}
    metric = Recorder("squad_v2", result={"f1": 1.0})
    score(tiny_encoder, make_task("span_qa", "qa", metrics=[metric]).with_data(data))
    counts = [len(row["answers"]["text"]) for row in metric.seen[1]]
    assert counts == [len(row["answers"]["answer_start"]) for row in metric.seen[1]] == [1, 0, 0, 1, 1]
    task = make_task("span_qa", "qa", metrics=[Recorder("squad")]).with_data(data)
    with pytest.raises(ConfigError, match="metric 'own' cannot score row 2, which has no answer: use squad_v2"):
        score(tiny_encoder, task)


def test_scores_of_one_name(tiny_encoder: str) -> None:
    task = make_task("span_qa", "qa", metrics=["f1", Recorder("squad", result={"exact_match": 50.0, "f1": 60.0})])
    with pytest.raises(ConfigError, match="two metrics give a score called 'f1'"):
        score(tiny_encoder, task)
    task = make_task("single_label", "rte", metrics=[lambda p, r: {"a": {"b": 1.0}, "a_b": 2.0}])
    with pytest.raises(ConfigError, match="returns two scores called 'a_b'"):
        score(tiny_encoder, task)


def test_the_first_metric_chooses(tiny_encoder: str) -> None:
    task = make_task("single_label", "rte", metrics=[lambda p, r: {"quality": 9.0, "other": 1.0}, "accuracy"])
    rows = EncodedTask(task, task.dataset["validation"], AutoTokenizer.from_pretrained(tiny_encoder), 64)
    found = rows.score(np.eye(2)[[0, 1, 1, 0, 1]])
    assert found == {"quality": 9.0, "other": 1.0, "accuracy": 0.4}
    assert rows.primary(found) == 9.0


def test_a_metric_of_evaluate_that_fails(tiny_encoder: str) -> None:
    class Fails(Recorder):
        def _compute(self, predictions: Any, references: Any) -> Any:
            raise ValueError("Target is multiclass but average='binary'.")

    task = make_task("single_label", "rte", metrics=[Fails("classes")])
    with pytest.raises(ConfigError, match=r"metric 'own' cannot be computed \(Target is multiclass.*use a function"):
        score(tiny_encoder, task)


def test_a_metric_that_gives_no_number(tiny_encoder: str) -> None:
    task = make_task("single_label", "rte", metrics=[lambda p, r: {"f1": np.ones(2)}])
    with pytest.raises(ConfigError, match=r"metric '<lambda>' returns f1=array.*, which is not a number"):
        score(tiny_encoder, task)
