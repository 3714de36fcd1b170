"""`tasks.json` and the tokenizer: what is written, by whom, and what is trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from answers import REQUESTS, made, saved
from tiny_tasks import make_task, make_trainer
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError, StorageError
from pal_adapters.multitask import HeadConfig, Predictor, Task, TaskDescription, TaskHeads
from pal_adapters.multitask.model.saving import copy_saved
from pal_adapters.multitask.tasks.task import get_task


def test_the_trainer_writes_whole_folders(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_encoder, tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, max_length=40, learning_rate=1e-2, save_total_limit=5,
    )  # fmt: skip
    trainer.train()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "eval_average" in entry}
    for step in (2, 4, 6):
        tasks = Predictor.from_pretrained(tmp_path / f"checkpoint-{step}").tasks
        for name, metric in (("rte", "accuracy"), ("stsb", "pearson"), ("copa", "accuracy")):
            assert (tasks[name].metric, tasks[name].score) == (metric, logged[step][f"eval_{name}_{metric}"])
            assert tasks[name].max_length == 40
    trainer.save_model(str(tmp_path / "best"))
    best = trainer.state.best_global_step
    assert Predictor.from_pretrained(tmp_path / "best").tasks["stsb"].score == logged[best]["eval_stsb_pearson"]
    trainer.scored = None  # as after a step of training
    trainer.save_model(str(tmp_path / "later"))
    assert Predictor.from_pretrained(tmp_path / "later").tasks["stsb"].score is None
    stored = json.loads((tmp_path / "best" / "tasks.json").read_text())
    assert stored["base"] == {"id": tiny_encoder, "revision": None}
    assert {"transformers", "torch"} <= set(stored["versions"])


def test_saved_again_and_copied(tiny_encoder: str, tmp_path: Path) -> None:
    predictor = saved(tiny_encoder, "none", tmp_path / "a")
    model = TaskHeads.from_pretrained(tmp_path / "a")
    model.remove("copa")
    model.save_pretrained(tmp_path / "b")
    assert list(TaskHeads.from_pretrained(tmp_path / "b").described) == ["rte", "stsb", "ner", "qa", "topics"]
    with pytest.raises(ConfigError, match="has no tokenizer: pass processing_class="):
        Predictor.from_pretrained(tmp_path / "b")
    again = Predictor.from_pretrained(tmp_path / "b", processing_class=AutoTokenizer.from_pretrained(tiny_encoder))
    assert again(REQUESTS[0]) == predictor(REQUESTS[0])
    copy_saved(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "b" / "tasks.json").read_text() == (tmp_path / "c" / "tasks.json").read_text()


def test_folders_of_earlier_releases(tiny_encoder: str, tmp_path: Path) -> None:
    predictor = saved(tiny_encoder, "none", tmp_path)
    (tmp_path / "tasks.json").unlink()
    assert TaskHeads.from_pretrained(tmp_path).described == {}
    with pytest.raises(ConfigError, match=r"does not say how task 'rte' is encoded.*pass tasks=\[Task\('rte'"):
        Predictor.from_pretrained(tmp_path)
    _, tasks = made(tiny_encoder, "none")
    again = Predictor.from_pretrained(tmp_path, tasks=[task.describe(max_length=64) for task in tasks])
    assert again(REQUESTS[0]) == predictor(REQUESTS[0])


def _set(path: str, value: Any) -> Any:
    def change(stored: Any) -> None:
        *front, last = path.split("/")
        for part in front:
            stored = stored[int(part) if part.isdigit() else part]
        if value is ...:
            del stored[last]
        else:
            stored[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("format", 9), _set("format", True), _set("format", ...), _set("tasks", ...), _set("tasks", {}),
        _set("tasks/0", 3), _set("tasks/0/name", "none"), _set("tasks/0/name", "stsb"), _set("tasks/0/name", 3),
        _set("tasks/0/kind", "regression"), _set("tasks/0/kind", ["x"]), _set("tasks/0/text_columns", []),
        _set("tasks/0/text_columns", "first"), _set("tasks/0/text_columns", [1]), _set("tasks/0/label_names", ["a"]),
        _set("tasks/0/label_names", ["a", "a"]), _set("tasks/0/label_names", None), _set("tasks/0/max_length", 0),
        _set("tasks/0/max_length", "x"), _set("tasks/0/max_length", 10**30), _set("tasks/0/max_length", True),
        _set("tasks/0/template", 3), _set("tasks/0/unanswerable", 1), _set("tasks/0/metric", 3),
        _set("tasks/0/score", "x"), _set("tasks/0/score", float("nan")), _set("tasks/0/thresholds", [0.5, 0.5]),
        _set("tasks/5/thresholds", [0.5, 2, 0.5]), _set("tasks/5/thresholds", [0.5]), _set("tasks/0/more", 1),
        _set("tasks/0/score", ...), _set("base", 3), _set("base/id", 3), _set("base/revision", 3),
        _set("versions", []), _set("versions/torch", 3), _set("more", 1),
    ],
)  # fmt: skip
def test_a_damaged_file(tiny_encoder: str, tmp_path_factory: Any, tmp_path: Path, change: Any) -> None:
    source = tmp_path_factory.getbasetemp() / "whole"
    if not source.is_dir():
        saved(tiny_encoder, "none", source)
    shutil.copytree(source, tmp_path / "folder")
    path = tmp_path / "folder" / "tasks.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(StorageError, match=r"tasks\.json"):
        Predictor.from_pretrained(tmp_path / "folder")
    for text in ("", "[]", "{", "[" * 100_000, path.read_text()[:-40]):
        path.write_text(text)
        with pytest.raises(StorageError, match=r"tasks\.json"):
            TaskHeads.from_pretrained(tmp_path / "folder")


def test_a_damaged_tokenizer(tiny_encoder: str, tmp_path: Path) -> None:
    saved(tiny_encoder, "none", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StorageError, match="the tokenizer cannot be loaded"):
        Predictor.from_pretrained(tmp_path)


def test_a_tokenizer_that_is_a_link(tiny_encoder: str, tmp_path: Path) -> None:
    saved(tiny_encoder, "none", tmp_path / "folder")
    shutil.move(tmp_path / "folder" / "tokenizer.json", tmp_path / "outside.json")
    (tmp_path / "folder" / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(StorageError, match="leads out of its folder"):
        Predictor.from_pretrained(tmp_path / "folder")


def test_texts_made_by_functions(tiny_encoder: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    model, _ = made(tiny_encoder, "none", ("rte", "copa"))
    own = make_task("single_label", "rte", render=lambda row: [(row["first"] + " not", row["second"])])
    copa = get_task("super_glue/copa")
    model.save_pretrained(tmp_path, processing_class=tokenizer, tasks=[own, copa])
    tasks = model.described
    assert (tasks["rte"].template, tasks["copa"].template) == ("custom", "super_glue/copa")
    assert tasks["copa"].label_names == ("choice1", "choice2")
    with pytest.raises(ConfigError, match="its text is made by a function: pass tasks="):
        Predictor.from_pretrained(tmp_path)
    predictor = Predictor.from_pretrained(tmp_path, tasks=[own])
    plain = Predictor(model, tokenizer, [make_task("single_label", "rte"), make_task("multiple_choice", "copa")])
    given: Any = predictor({"task": "rte", "first": "the", "second": "is", "more": 3})
    wanted: Any = plain({"task": "rte", "first": "the not", "second": "is"})
    assert given.scores == pytest.approx(wanted.scores)
    row = {"premise": "the", "choice1": "is", "choice2": "all not", "question": "cause"}
    given = predictor({"task": "copa", **row})
    first = "the What was the cause of this?"
    wanted = plain({"task": "copa", "first": first, "second": "is", "third": "all not"})
    assert list(given.scores.values()) == pytest.approx(list(wanted.scores.values()))
    assert given.text == row[given.choice]
    with pytest.raises(ConfigError, match="'question' holds 'why'; allowed: cause, effect"):
        predictor({"task": "copa", **row, "question": "why"})


def test_tasks_that_do_not_fit(tiny_encoder: str, tmp_path: Path) -> None:
    model = TaskHeads(made(tiny_encoder, "none", ("rte",))[0].backbone)
    model.add("rte", HeadConfig("single_label", 3))
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    for tasks, given, match in [
        ([make_task("single_label", "rte")], tokenizer, "has 2 label names, but its head has 3"),
        ([make_task("regression", "rte")], tokenizer, "is regression, but its head is single_label"),
        ([make_task("regression", "other")], tokenizer, "'other', which is not on the model: 'rte'"),
        ([make_task("single_label", "rte", num_labels=3)], None, "tasks needs processing_class, or descriptions"),
        (["rte"], tokenizer, "tasks has a str: pass Task or TaskDescription"),
    ]:
        with pytest.raises(ConfigError, match=match):
            model.save_pretrained(tmp_path / "x", processing_class=given, tasks=tasks)
        assert not (tmp_path / "x").exists()
    short = TaskDescription("rte", "single_label", ("text",), ("a", "b", "c"), max_length=3)
    model.save_pretrained(tmp_path / "short", processing_class=tokenizer, tasks=[short])
    with pytest.raises(ConfigError, match="3 special tokens leave no room for text"):
        Predictor.from_pretrained(tmp_path / "short")


def test_label_names_and_thresholds(tiny_encoder: str, tmp_path: Path) -> None:
    model, _ = made(tiny_encoder, "none", ("topics",))
    task = Task("topics", {}, kind="multi_label", text_columns=("first",), label_names=("art", "law", "sport"))
    described = task.describe(max_length=20, thresholds=(0.0, 1.0, 0.0))
    model.save_pretrained(tmp_path, processing_class=AutoTokenizer.from_pretrained(tiny_encoder), tasks=[described])
    found: Any = Predictor.from_pretrained(tmp_path)("the is", task="topics")
    assert set(found.labels) == {"art", "sport"}
    assert set(found.scores) == {"art", "law", "sport"}
