"""Labels that are written as names of classes, and names that the data know."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

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
    task = task_of("single_label", ["yes", "no", "no"], num_labels=2)
    with pytest.raises(TaskDataError, match=r"row 1: label 'yes' is of type str.*name the classes in label_names"):
        labels_of(tiny_encoder, task)
