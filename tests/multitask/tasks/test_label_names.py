"""Labels that are written as names of classes, and names that the data know."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import EncodedTask, Task, TaskDataError

NAMES = ("no", "perhaps", "yes")


def task_of(kind: str, labels: list[Any], feature: Any = None, **changes: Any) -> Task:
    columns: dict[str, Any] = {"words": [["the", "is"]] * len(labels), "text": ["the is"] * len(labels)}
    rows = datasets.Dataset.from_dict({**columns, "label": labels})
    if feature is not None:
        rows = datasets.Dataset.from_dict(
            rows.to_dict(), features=datasets.Features({**rows.features, "label": feature})
        )
    column = "words" if kind == "token_tagging" else "text"
    given: dict[str, Any] = {"kind": kind, "text_columns": (column,), "label_column": "label", **changes}
    return Task("own", {"train": rows, "test": rows.select([2, 0])}, **given)


def labels_of(tiny_encoder: str, task: Task, split: str = "train") -> list[Any]:
    encoded = EncodedTask(task, task.dataset[split], AutoTokenizer.from_pretrained(tiny_encoder), 16, where=split)
    return [np.asarray(encoded[row]["label"]).tolist() for row in range(len(encoded))]


def test_names_in_place_of_numbers(tiny_encoder: str) -> None:
    task = task_of("single_label", ["yes", "no", "perhaps"], label_names=NAMES)
    assert labels_of(tiny_encoder, task) == [2, 0, 1]
    assert labels_of(tiny_encoder, task, "test") == [1, 2]  # rows in another order than they lie in memory
    assert task.dataset["train"]["label"][:] == ["yes", "no", "perhaps"]


def test_sets_of_names(tiny_encoder: str) -> None:
    task = task_of("multi_label", [["yes", "no"], [], ["perhaps"]], label_names=NAMES)
    assert labels_of(tiny_encoder, task) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_names_of_tags(tiny_encoder: str) -> None:
    task = task_of("token_tagging", [["no", "yes"], ["yes", "yes"], ["no", "no"]], label_names=NAMES)
    assert labels_of(tiny_encoder, task) == [[-100, 0, 2, -100], [-100, 2, 2, -100], [-100, 0, 0, -100]]


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "token_tagging"])
def test_names_that_the_data_know(tiny_encoder: str, kind: str) -> None:
    labels: list[Any] = [2, 0, 1] if kind == "single_label" else [[2, 0], [1, 0], [0, 1]]
    feature: Any = datasets.ClassLabel(names=list(NAMES))
    task = task_of(kind, labels, feature if kind == "single_label" else datasets.Sequence(feature))
    assert (task.label_names, task.num_labels) == (NAMES, 3)
    assert task.head_config().label_names == NAMES
    assert task_of(kind, labels, task.dataset["train"].features["label"], num_labels=4).label_names == ()
    given = task_of(kind, labels, task.dataset["train"].features["label"], label_names=("a", "b", "c"))
    assert given.label_names == ("a", "b", "c")


def test_a_name_that_the_task_lacks(tiny_encoder: str) -> None:
    task = task_of("single_label", ["yes", "nay", "no"], label_names=NAMES)
    with pytest.raises(TaskDataError, match="task 'own', train, row 2: label 'nay' is not one of label_names: 'no', "):
        labels_of(tiny_encoder, task)
    task = task_of("single_label", ["yes", "no", "no"], num_labels=3)
    with pytest.raises(TaskDataError, match=r"row 1: label 'yes' is of type str.*name the classes in label_names"):
        labels_of(tiny_encoder, task)


def test_transforms_stay(tiny_encoder: str) -> None:
    task = task_of("single_label", ["yes", "no", "perhaps"], label_names=NAMES)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)

    def negated(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return batch | ({"text": [f"{text} not" for text in batch["text"]]} if "text" in batch else {})

    encoded = EncodedTask(task, task.dataset["train"].with_transform(negated), tokenizer, 16)
    assert tokenizer.decode(encoded[0]["inputs"][0]["input_ids"]) == "[CLS] the is not [SEP]"
    assert encoded[0]["label"] == 2


def test_sets_of_names_are_no_flags(tiny_encoder: str) -> None:
    task = task_of("multi_label", [["yes", "no"], ["no", "yes"], ["yes"]], label_names=("no", "yes"))
    rows, tokenizer = task.dataset["train"].select([0, 1]), AutoTokenizer.from_pretrained(tiny_encoder)
    for one in (task, Task("own", {}, kind="multi_label", text_columns=("text",), label_names=("no", "yes"))):
        encoded = EncodedTask(one, rows, tokenizer, 16)
        assert encoded.labels is not None
        assert encoded.labels.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    feature = datasets.Sequence(datasets.ClassLabel(names=["no", "yes"]))
    task = task_of("multi_label", [[0, 1], [1, 0], [0, 1]], feature)
    assert labels_of(tiny_encoder, task) == [[1.0, 1.0]] * 3


def test_a_split_that_lacks_a_class(tiny_encoder: str) -> None:
    task = task_of("single_label", [2, 0, 1], datasets.ClassLabel(names=list(NAMES)))
    rows = task_of("single_label", [1, 0, 1], datasets.ClassLabel(names=["no", "yes"])).dataset["train"]
    other = task_of("single_label", [1, 0, 1], datasets.ClassLabel(names=["nein", "vielleicht", "ja"]))
    for given, expected in ((rows, [2, 0, 2]), (other.dataset["train"], [1, 0, 1])):
        encoded = EncodedTask(task, given, AutoTokenizer.from_pretrained(tiny_encoder), 16)
        assert encoded.labels is not None
        assert encoded.labels.tolist() == expected


def test_splits_whose_classes_overlap(tiny_encoder: str) -> None:
    task = task_of("single_label", [1, 0, 1], datasets.ClassLabel(names=["no", "yes"]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    rows = task_of("single_label", [2, 0, 2], datasets.ClassLabel(names=list(NAMES))).dataset["train"]
    encoded = EncodedTask(task, rows, tokenizer, 16)
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [1, 0, 1]
    rows = task_of("single_label", [2, 1, 2], datasets.ClassLabel(names=list(NAMES))).dataset["train"]
    with pytest.raises(TaskDataError, match="row 2: label 'perhaps' is not one of label_names: 'no', 'yes'"):
        EncodedTask(task, rows, tokenizer, 16)


def test_flags_of_named_values(tiny_encoder: str) -> None:
    feature = datasets.Sequence(datasets.ClassLabel(names=["no", "yes"]))
    task = task_of("multi_label", [[0, 1, 0], [1, 1, 0], [0, 0, 0]], feature, num_labels=3)
    assert labels_of(tiny_encoder, task) == [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_absent_labels_as_texts(tiny_encoder: str) -> None:
    task = task_of("single_label", ["yes", "no", "perhaps"], label_names=NAMES)
    for label in ("", "-1"):
        rows = datasets.Dataset.from_dict({"text": ["the", "is"], "label": [label, label]})
        encoded = EncodedTask(task, rows, AutoTokenizer.from_pretrained(tiny_encoder), 16, needs_labels=False)
        assert not encoded.has_labels


def test_labels_are_shown_as_they_were_given(tiny_encoder: str) -> None:
    task = task_of("multi_label", [["yes", "yes"], ["no"], []], label_names=NAMES)
    with pytest.raises(TaskDataError, match=r"row 1: label \['yes', 'yes'\] names a class twice"):
        labels_of(tiny_encoder, task)


@pytest.mark.parametrize(
    ("names", "message"),
    [((False, True), r"label_names=\(False, True\) .* in YAML, put them in quotes"), (("a", "b", "a"), "'a' twice")],
)
def test_names_that_are_none(names: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of("single_label", [0, 1, 0], label_names=names)
