from __future__ import annotations

import pytest

from pal_adapters.errors import PalAdaptersError
from pal_adapters.multitask import TaskDataError
from pal_adapters.multitask.tasks.glue import TASKS, find_tasks, task_names
from pal_adapters.multitask.tasks.record import record_f1
from pal_adapters.multitask.tasks.task import get_task

COLUMNS = {
    "glue/cola": ("sentence",),
    "glue/mnli": ("premise", "hypothesis"),
    "glue/mrpc": ("sentence1", "sentence2"),
    "glue/qnli": ("question", "sentence"),
    "glue/qqp": ("question1", "question2"),
    "glue/rte": ("sentence1", "sentence2"),
    "glue/sst2": ("sentence",),
    "glue/stsb": ("sentence1", "sentence2"),
    "glue/wnli": ("sentence1", "sentence2"),
    "super_glue/boolq": ("question", "passage"),
    "super_glue/cb": ("premise", "hypothesis"),
    "super_glue/copa": ("premise", "choice1", "choice2", "question"),
    "super_glue/multirc": ("paragraph", "question", "answer"),
    "super_glue/record": ("passage", "query", "entity"),
    "super_glue/rte": ("premise", "hypothesis"),
    "super_glue/wic": ("word", "sentence1", "sentence2"),
    "super_glue/wsc": ("text", "span1_text", "span2_text", "span2_index"),
}

EVERY = {name: get_task(name) for name in TASKS}


def test_every_task_has_the_columns_of_its_benchmark() -> None:
    assert {name: task.text_columns for name, task in EVERY.items()} == COLUMNS
    assert {task.label_column for task in EVERY.values()} == {"label"}
    assert {name: task.full_name for name, task in EVERY.items()} == {name: name for name in TASKS}


def test_numbers_of_labels() -> None:
    odd = {name: task.num_labels for name, task in EVERY.items() if task.num_labels != 2}
    assert odd == {"glue/mnli": 3, "glue/stsb": 1, "super_glue/cb": 3, "super_glue/copa": None}
    for task in EVERY.values():
        assert len(task.label_names) == (task.num_labels if task.kind == "single_label" else 0)
    kinds = {name: task.kind for name, task in EVERY.items() if task.kind != "single_label"}
    assert kinds == {"glue/stsb": "regression", "super_glue/copa": "multiple_choice"}
    assert get_task("stsb").label_range == (0.0, 5.0)


def test_heads_are_as_wide_as_the_classes_but_for_choices() -> None:
    configs = {name: task.head_config() for name, task in EVERY.items()}
    assert {name: one.outputs for name, one in configs.items() if one.outputs != one.num_labels} == {
        "super_glue/copa": 1
    }
    assert configs["super_glue/copa"].num_choices == 2


def test_order_of_class_names() -> None:
    assert get_task("mnli").label_names == ("entailment", "neutral", "contradiction")
    assert get_task("cb").label_names == ("entailment", "contradiction", "neutral")
    assert get_task("rte").label_names == ("entailment", "not_entailment")
    assert get_task("wnli").label_names == ("not_entailment", "entailment")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("sts-b", "glue/stsb"),
        ("STS_B", "glue/stsb"),
        ("sst-2", "glue/sst2"),
        ("SST2", "glue/sst2"),
        (" CoLA ", "glue/cola"),
        ("multi-rc", "super_glue/multirc"),
        ("BoolQ", "super_glue/boolq"),
        ("rte", "glue/rte"),
        ("glue/rte", "glue/rte"),
        ("super_glue/rte", "super_glue/rte"),
        ("SuperGLUE/RTE", "super_glue/rte"),
        ("super-glue/wsc", "super_glue/wsc"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert get_task(spelling).full_name == name


@pytest.mark.parametrize("name", ["foo", "", "glue/boolq", "super_glue/cola", "other/rte", "a/b/rte", "recorder"])
def test_unknown_tasks_name_the_known_ones(name: str) -> None:
    with pytest.raises(TaskDataError, match="unknown task") as raised:
        get_task(name)
    assert repr(name) in str(raised.value)
    assert ", ".join(task_names()) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, PalAdaptersError)


def test_only_rte_is_in_both_benchmarks() -> None:
    assert [name for name in task_names() if len(find_tasks(name)) > 1] == ["rte"]
    assert len(task_names()) == 16


def test_first_metric_chooses_the_model() -> None:
    assert {name: task.metrics[0] for name, task in EVERY.items() if task.metrics[0] != "accuracy"} == {
        "glue/cola": "matthews",
        "glue/stsb": "pearson",
        "super_glue/multirc": "f1",
        "super_glue/record": record_f1,
    }


def test_sentences_and_pairs_are_taken_as_they_are() -> None:
    assert get_task("cola").segments({"sentence": "A b.", "label": 0}) == [("A b.", None)]
    assert get_task("qnli").segments({"question": "Q?", "sentence": "S."}) == [("Q?", "S.")]
    assert get_task("boolq").segments({"question": "q", "passage": "p"}) == [("q", "p")]


def test_copa_is_one_input_for_each_choice() -> None:
    row = {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I slept.", "question": "effect"}
    first, second = get_task("copa").segments(row)
    assert first == ("It rained. What happened as a result?", "I got wet.")
    assert second == ("It rained. What happened as a result?", "I slept.")
    assert get_task("copa").segments(row | {"question": "cause"})[0][0] == "It rained. What was the cause of this?"
    with pytest.raises(TaskDataError, match="'why'; allowed: cause, effect"):
        get_task("copa").segments(row | {"question": "why"})


def test_multirc_puts_the_answer_behind_the_question() -> None:
    row = {"paragraph": "P.", "question": "Q?", "answer": "A"}
    assert get_task("multirc").segments(row) == [("P.", "Q? A")]
    assert get_task("multirc").segments(row | {"answer": ""}) == [("P.", "Q?")]


def test_wic_names_the_word() -> None:
    row = {"word": "bank", "sentence1": "The bank is shut.", "sentence2": "The bank is muddy."}
    assert get_task("wic").segments(row) == [("bank: The bank is shut.", "The bank is muddy.")]


def test_wsc_marks_the_pronoun_by_its_word_number() -> None:
    row = {"text": "He told Bob that he lost.", "span1_text": "Bob", "span2_text": "he", "span2_index": 4}
    assert get_task("wsc").segments(row) == [("He told Bob that * he * lost.", "Bob")]
    two = row | {"span2_text": "Bob that", "span2_index": 2}
    assert get_task("wsc").segments(two) == [("He told * Bob that * he lost.", "Bob")]


@pytest.mark.parametrize("index", [6, -1, "4", None, True])
def test_wsc_refuses_a_word_number_outside_of_the_text(index: object) -> None:
    row = {"text": "He told Bob that he lost.", "span1_text": "Bob", "span2_text": "he", "span2_index": index}
    with pytest.raises(TaskDataError, match=r"span2_index.*allowed: 0 to 5"):
        get_task("wsc").segments(row)
