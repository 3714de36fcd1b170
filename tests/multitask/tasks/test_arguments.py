"""Arguments of a `Task` that are of a wrong type or without effect, and functions of a user that return nonsense."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from tiny_tasks import make_task
from torch.nn import functional as F
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import EncodedTask, HeadConfig, Task, TaskDataError, train_dev_split
from pal_adapters.multitask.model.heads import Head


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("single_label", {"loss": 3}, "task 'own': loss=3 is not allowed: use a function or None"),
        ("single_label", {"render": "x"}, "render='x' is not allowed"),
        ("single_label", {"expand": 3}, "expand=3 is not allowed"),
        ("single_label", {"text_columns": 3}, "text_columns=3 is not allowed: use a list"),
        ("single_label", {"text_columns": ("first", 3)}, r"text_columns=\('first', 3\) is not allowed: use strings"),
        ("single_label", {"text_columns": ("first", "second", "third")}, "text_columns=.* one column, or two"),
        ("token_tagging", {"text_columns": ("tokens", "more")}, "text_columns=.* name one column"),
        ("language_modeling", {"text_columns": ("text", "more")}, "text_columns=.* name one column"),
        ("span_qa", {"text_columns": ("question",)}, "text_columns=.* of the question and of the context"),
        ("single_label", {"validation_splits": 3}, "validation_splits=3 is not allowed: use a list"),
        ("single_label", {"validation_splits": ("validation",) * 2}, "validation_splits=.* name each split once"),
        ("single_label", {"benchmark": 3}, "benchmark=3 is not allowed"),
        ("single_label", {"train_split": None}, "train_split=None is not allowed"),
        ("single_label", {"label_column": 3}, "label_column=3 is not allowed"),
        ("single_label", {"num_labels": 0}, "num_labels=0 is not allowed"),
        ("single_label", {"num_labels": 10**9}, "num_labels=1000000000 is not allowed"),
        ("regression", {"num_labels": 0}, "num_labels=0 is not allowed"),
        ("regression", {"label_range": (1, 0)}, "label_range=.* use the smallest and the largest label"),
        ("regression", {"label_range": (float("nan"), 1)}, "label_range=.* is not allowed"),
        ("regression", {"label_range": 1}, "label_range=1 is not allowed"),
        ("regression", {"label_range": ("a", "b")}, "label_range=.* is not allowed"),
        ("multi_label", {"label_range": (0, 1)}, "label_range has no effect for kind='multi_label'"),
        ("token_tagging", {"render": lambda row: [("the", None)]}, "render has no effect for kind='token_tagging'"),
        ("span_qa", {"render": lambda row: [("the", None)]}, "render has no effect for kind='span_qa'"),
        ("span_qa", {"label_names": ("a", "b")}, "label_names has no effect for kind='span_qa'"),
    ],
)
def test_arguments_that_cannot_be(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(kind, "own", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"render": lambda row: "x"}, "row 1: render returns 'x', which is neither a pair of texts nor"),
        ({"render": lambda row: [("the", 3)]}, "row 1: render returns .*, which is neither a pair of texts nor"),
        ({"render": lambda row: [("a", None)] * 2}, "row 1: render returns 2 encoder inputs instead of 1"),
        ({"render": lambda row: [(row["none"], None)]}, "row 1: render raises KeyError: 'none'"),
        (
            {"render": lambda row: [("the", None if row["label"] else "is")]},
            "row 2: render returns a pair of texts for some inputs and a single text for others",
        ),
        ({"expand": lambda rows: 3}, "expand returns a int, not a datasets.Dataset"),
    ],
)
def test_functions_of_a_task(tiny_encoder: str, changes: dict[str, Any], message: str) -> None:
    task = make_task("single_label", "own", **changes)
    with pytest.raises(TaskDataError, match=f"task 'own', training.*{message}"):
        EncodedTask(task, task.dataset["train"], AutoTokenizer.from_pretrained(tiny_encoder), 16, where="training")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), r"a tensor of shape \[3\]"),
        (lambda logits, labels: logits.sum().reshape(1), r"a tensor of shape \[1\]"),
        (lambda logits, labels: 1.0, "a float"),
        (lambda logits, labels: logits.detach().sum(), "a value without gradient"),
    ],
)
def test_losses_that_are_no_mean(loss: Any, message: str) -> None:
    head = Head(HeadConfig("single_label", 2), 4, loss=loss)
    with pytest.raises(ConfigError, match=f"loss returns {message}"):
        head.loss(head(torch.ones(3, 4)), torch.tensor([0, 1, 1]))


def test_tags_that_are_all_ignored(tiny_encoder: str) -> None:
    rows = [{"tokens": ["the", "is"], "tags": [-100, -100]}] * 2
    task = Task("own", {"train": rows}, kind="token_tagging", num_labels=3)
    with pytest.raises(TaskDataError, match="task 'own', training: every label is -100"):
        EncodedTask(task, rows, AutoTokenizer.from_pretrained(tiny_encoder), 16, where="training")


def named(labels: list[int], names: list[str]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": ["the is"] * len(labels), "label": labels}, features=features)


def test_classes_in_another_order_without_label_names(tiny_encoder: str) -> None:
    data = {"train": named([0, 1, 2], ["a", "b", "c"]), "validation": named([0, 1, 2], ["c", "a", "b"])}
    task = Task("own", data, text_columns="text", num_labels=5)
    rows = EncodedTask(task, data["validation"], AutoTokenizer.from_pretrained(tiny_encoder), 16)
    assert rows.labels is not None
    assert rows.labels.tolist() == [2, 0, 1]


def test_other_names_for_another_number_of_classes(tiny_encoder: str) -> None:
    data = {"train": named([0, 1, 2], ["a", "b", "c"]), "validation": named([0, 1, 1], ["x", "y"])}
    task = Task("own", data, text_columns="text")
    with pytest.raises(TaskDataError, match="'label' has the classes 'x', 'y', none of which is one of label_names"):
        EncodedTask(task, data["validation"], AutoTokenizer.from_pretrained(tiny_encoder), 16)


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([{"label": 0}], {"label_column": "none"}, "no column 'none'; found: label"),
        ([{"label": 0}], {"split_columns": ("none",)}, "no column 'none'; found: label"),
        ([{"label": [0, 1]}], {}, "column 'label' holds lists or dicts"),
        ([{"label": 0}, {"label": None}], {}, "row 2: column 'label' holds None"),
        ([{"words": ["a"]}], {"split_columns": "words"}, "column 'words' holds lists or dicts"),
    ],
)
def test_columns_that_do_not_split(rows: list[dict[str, Any]], given: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskDataError, match=message):
        train_dev_split(datasets.Dataset.from_list(rows * 10), **given)
