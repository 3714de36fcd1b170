"""Examples that do not fit a model's input: words, questions and labels at the limits."""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import EncodedTask, Task, TaskDataError

NAMES = ("O", "B-X", "I-X", "B-Y")


def encoded(folder: str, task: Task, max_length: int = 16, split: str = "train") -> EncodedTask:
    return EncodedTask(task, task.dataset[split], AutoTokenizer.from_pretrained(folder), max_length, where=split)


def tagging(tokens: list[list[str]], tags: list[list[int]], **changes: Any) -> Task:
    rows = [{"tokens": words, "tags": labels} for words, labels in zip(tokens, tags, strict=True)]
    given = {"label_names": NAMES, "metrics": ("f1", "accuracy"), **changes}
    return Task("ner", {"train": rows}, kind="token_tagging", **given)


def perfect(rows: EncodedTask, classes: int = 4) -> np.ndarray:
    """Logits of a model that is right about every token that it sees."""
    logits = np.zeros((len(rows), int(rows.lengths().max()), classes))
    for number, row in enumerate(rows):
        for place, tag in enumerate(row["label"]):
            logits[number, place, max(tag, 0)] = 1.0
    return logits


def test_every_word_keeps_its_place(tiny_encoder: str) -> None:
    tokens = [["the", "", "is", "xyz"], ["", "", "in", "it"], ["no", "all", "in", "it"]]
    tags = [[1, 2, 0, 3], [0, 1, 0, -100], [3, -100, 1, 2]]
    with pytest.warns(UserWarning, match=r"task 'ner', train: the model does not see 3 of 12 words: .* in row 1\."):
        rows = encoded(tiny_encoder, tagging(tokens, tags))
    found = rows.predictions(perfect(rows))
    assert found[0] == [1, -100, 0, 3]
    assert found[1][:3] == [-100, -100, 0]
    assert [found[2][number] for number in (0, 2, 3)] == [3, 1, 2]
    assert [len(one) for one in found] == [4, 4, 4]
    assert rows.score(perfect(rows))["accuracy"] == pytest.approx(7 / 10)  # of the words whose labels count


def test_words_beyond_the_end_count_as_missed(tiny_encoder: str) -> None:
    words, tags = ["the"] * 40, [1, 0] * 20
    with pytest.warns(
        UserWarning, match=r"does not see 26 of 40 words: they lie beyond max_length=16 .*raise max_len"
    ):
        rows = encoded(tiny_encoder, tagging([words], [tags]))
    found = rows.predictions(perfect(rows))
    assert found == [tags[:14] + [-100] * 26]
    # Seven entities of twenty are found, and none is made up.
    assert rows.score(perfect(rows)) == {"accuracy": 14 / 40, "f1": pytest.approx(2 * 7 / (7 + 20))}
    with pytest.warns(UserWarning, match="does not see"):
        plain = encoded(tiny_encoder, tagging([words], [tags], label_names=("a", "b", "c", "d")))
    expected = np.mean([f1_score([t == k for t in tags], [t == k for t in found[0]]) for k in (0, 1)])
    assert plain.score(perfect(plain))["f1"] == pytest.approx(expected)


def test_custom_metrics_get_a_tag_for_every_word(tiny_encoder: str) -> None:
    seen: list[Any] = []

    def own(predictions: Any, references: Any) -> float:
        seen[:] = [predictions, references]
        return 0.5

    with pytest.warns(UserWarning, match="does not see 1 of 3 words"):
        rows = encoded(tiny_encoder, tagging([["the", "", "is"]], [[1, 2, -100]], metrics=own))
    rows.score(perfect(rows))
    assert seen == [[[1, -100]], [[1, 2]]]


def test_words_that_all_fit_warn_of_nothing(tiny_encoder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = encoded(tiny_encoder, tagging([["the", "is"], ["xyz"]], [[1, 2], [3]]))
    assert rows.predictions(perfect(rows)) == [[1, 2], [3]]
    assert rows.score(perfect(rows)) == {"f1": 1.0, "accuracy": 1.0}


def test_words_that_are_no_texts(tiny_encoder: str) -> None:
    rows = datasets.Dataset.from_dict({"tokens": [["the"], ["is", None]], "tags": [[1], [1, 1]]})
    with pytest.raises(TaskDataError, match="row 2: column 'tokens' has the word None, which is not a text"):
        encoded(tiny_encoder, Task("ner", {"train": rows}, kind="token_tagging", label_names=NAMES))


@pytest.mark.parametrize("words", [30, 14, 13, 10])
def test_questions_that_leave_no_room(tiny_encoder: str, words: int) -> None:
    question, context = " ".join(["the"] * words), " ".join(["it", "is"] * 6)
    answers = {"text": ["it"], "answer_start": [0]}
    rows = [{"question": "is", "context": context, "answers": answers}] * 2
    rows.append({"question": question, "context": context, "answers": answers})
    task = Task("qa", {"train": rows}, kind="span_qa")
    room = max(16 - 3 - words, 0)  # windows overlap by a quarter
    message = rf"task 'qa', train, row 3: the question has {words} tokens, .* room for {room} of the 12 tokens"
    with pytest.raises(TaskDataError, match=message) as error:
        encoded(tiny_encoder, task)
    enough = int(str(error.value).split("raise max_length to ")[1].split()[0])
    assert len(encoded(tiny_encoder, task, enough)) >= 3
    with pytest.raises(TaskDataError, match="row 3"):
        encoded(tiny_encoder, task, enough - 1)


def test_a_long_question_with_a_short_context(tiny_encoder: str) -> None:
    rows = [{"question": " ".join(["the"] * 12), "context": "it", "answers": {"text": ["it"], "answer_start": [0]}}]
    one = encoded(tiny_encoder, Task("qa", {"train": rows}, kind="span_qa"))
    assert len(one) == 1
    assert one.labels is not None
    assert one.labels.tolist() == [[14, 14]]


def test_no_room_for_any_text(tiny_encoder: str) -> None:
    rows = [{"text": "the", "label": 0}, {"text": "is", "label": 1}]
    task = Task("own", {"train": rows}, text_columns=("text",), num_labels=2)
    with pytest.raises(ConfigError, match="max_length=2 is not allowed: 2 special tokens leave no room for text"):
        encoded(tiny_encoder, task, 2)
    assert encoded(tiny_encoder, task, 3).lengths().tolist() == [3, 3]


@pytest.mark.parametrize("value", [1e39, -1e39, 3.5e38])
@pytest.mark.parametrize("count", [1, 2])
def test_numbers_beyond_float32(tiny_encoder: str, value: float, count: int) -> None:
    labels: list[Any] = [0.0, 1.0, value] if count == 1 else [[0.0, 1.0], [1.0, 1.0], [0.0, value]]
    rows = [{"text": "the", "label": label} for label in labels]
    task = Task("price", {"test": rows}, kind="regression", text_columns=("text",), num_labels=count)
    with pytest.raises(TaskDataError, match=r"task 'price', test, row 3: label .* is out of the range of float32"):
        encoded(tiny_encoder, task, split="test")


def test_data_that_are_no_dataset(tiny_encoder: str) -> None:
    rows = [{"text": "the", "label": "yes"}, {"text": "is", "label": "no"}, {"text": "in", "label": "yes"}]
    forms = [rows, tuple(rows), pandas.DataFrame(rows, index=[5, 6, 7]), datasets.Dataset.from_list(rows)]
    for form in forms:
        task = Task("mood", {"train": form}, text_columns=("text",))
        assert task.dataset["train"].column_names == ["text", "label"]
        assert (task.label_names, task.num_labels) == (("no", "yes"), 2)
        assert encoded(tiny_encoder, task).labels.tolist() == [1, 0, 1]  # type: ignore[union-attr]
        given = EncodedTask(task, form, AutoTokenizer.from_pretrained(tiny_encoder), 16)
        assert given.labels.tolist() == [1, 0, 1]  # type: ignore[union-attr]
    some = [{"text": "the"}, {"text": "is", "label": 1}]
    assert Task("mood", {"train": some}, text_columns=("text",), num_labels=2).dataset["train"]["label"][:] == [
        None,
        1,
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"text": "the"}], r"dataset is a list: pass a dict of splits, such as \{'train': rows\}"),
        (datasets.Dataset.from_dict({"text": ["the"]}), "dataset is a Dataset: pass a dict of splits"),
        ({"train": {"text": ["the"]}}, "split 'train' is of type dict: pass a datasets.Dataset, a list of dicts"),
        ({"train": ["the", "is"]}, "split 'train' is of type list: pass a datasets.Dataset, a list of dicts"),
        ({"train": "train.csv"}, "split 'train' is of type str: pass"),
        ({"train": None}, "split 'train' is of type NoneType: pass"),
        (
            {"train": [{"text": "the"}, {"text": 3}]},
            "split 'train' cannot be converted to a datasets.Dataset .* one type",
        ),
    ],
)
def test_data_that_cannot_be_used(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"task 'own': {message}"):
        Task("own", data, text_columns=("text",), num_labels=2)


@pytest.mark.parametrize("kind", ["multi_label", "token_tagging"])
def test_names_of_labels_in_lists(tiny_encoder: str, kind: str) -> None:
    rows = [{"text": "the is", "words": ["the", "is"], "label": label} for label in (["b", "a"], ["c", "a"])]
    column = "words" if kind == "token_tagging" else "text"
    task = Task("own", {"train": rows}, kind=kind, text_columns=(column,), label_column="label")  # type: ignore[arg-type]
    assert task.label_names == ("a", "b", "c")
    label = encoded(tiny_encoder, task)[0]["label"].tolist()
    assert label == ([-100, 1, 0, -100] if kind == "token_tagging" else [1.0, 1.0, 0.0])


@pytest.mark.parametrize("name", ["rte\0", "r" * 101, " rte", "rte\n", "a\\b", "é" * 60])
def test_names_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        Task(name, {}, text_columns=("text",), num_labels=2)
