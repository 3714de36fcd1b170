"""Every field of the JSON files of a `TaskHeads` folder, with every type of JSON: the same value, or an error."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from pal_adapters.errors import StorageError
from pal_adapters.multitask import HeadConfig, TaskDescription, TaskHeads
from pal_adapters.multitask.model.description import read_description
from pal_adapters.multitask.model.heads import KINDS, POOLINGS
from pal_adapters.multitask.model.tasks_file import read_tasks

VALUES = [None, True, False, 0, 1, 2, 3, -1, 10**30, 0.5, 2.0, math.nan, math.inf, "", "a", "mean", "1", "../b", [],
          ["a"], ["a", "a"], [1], {}, {"a": 1}, [[]], "\ud800", ["\ud800"]]  # fmt: skip


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value) and len(set(value)) == len(value)


# What a field of a head or of a task accepts by itself; whether fields fit together is not looked at here.
FIELDS: dict[str, Any] = {
    "kind": lambda value: value in KINDS,
    "num_labels": lambda value: value is None or (is_count(value) and 0 < value <= 10_000_000),
    "num_choices": lambda value: is_count(value) and 0 < value < 10**6,
    "pooling": lambda value: value in POOLINGS,
    "dropout": lambda value: is_number(value) and 0 <= value < 1,
    "label_names": texts,
    "weight": lambda value: is_number(value) and 0 < value < 1e30,
    "name": lambda value: value in ("t", "u"),
    "text_columns": lambda value: texts(value) and bool(value),
    "max_length": lambda value: is_count(value) and 0 < value <= 1_000_000,
    "template": lambda value: isinstance(value, str) and bool(value),
    "unanswerable": lambda value: isinstance(value, bool),
    "thresholds": lambda value: value == [],
    "metric": lambda value: value is None or isinstance(value, str),
    "score": lambda value: value is None or is_number(value),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = TaskHeads(BertModel(BertConfig(**sizes, intermediate_size=8)))
    model.add("t", HeadConfig("single_label", 2, label_names=("no", "yes")))
    model.add("u", HeadConfig("token_tagging", 3))
    place = tmp_path_factory.mktemp("saved")
    described = [
        TaskDescription("t", "single_label", ("text",), ("no", "yes")),
        TaskDescription("u", "token_tagging", ("tokens",), ("LABEL_0", "LABEL_1", "LABEL_2")),
    ]
    model.save_pretrained(place, tasks=described)
    return place


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*path, key)
        if isinstance(value[key], (dict, list)):
            yield from places(value[key], (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("file", ["task_heads.json", "tasks.json"])
def test_every_type_in_every_field(folder: Path, tmp_path: Path, file: str) -> None:
    whole = (folder / file).read_text()
    (tmp_path / "task_heads.json").write_text((folder / "task_heads.json").read_text())
    heads = {task: read_description(folder).heads[task] for task in ("t", "u")}
    accepted = rejected = 0
    for path in places(json.loads(whole)):
        for value in VALUES:
            changed = json.loads(whole)
            at(changed, path[:-1])[path[-1]] = value
            (tmp_path / file).write_text(json.dumps(changed))
            field = next(key for key in reversed(path) if isinstance(key, str))
            message = None
            try:
                found = read_description(tmp_path) if file == "task_heads.json" else read_tasks(tmp_path, heads)
            except StorageError as error:
                message = str(error)
            if message is not None:
                rejected += 1
                assert str(tmp_path / file) in message
                assert message.isprintable()
                assert "NoneType" not in message, "it says what is wrong"
                continue
            accepted += 1
            assert "\\ud800" not in json.dumps(value)
            if field in FIELDS and (path[0] != "tasks" or len(path) > 2):
                whole_field = at(changed, path[: path.index(field) + 1])
                assert FIELDS[field](whole_field), (path, value)
            if file == "tasks.json" and isinstance(found, dict) and len(path) == 3:
                name = changed["tasks"][path[1]]["name"]
                assert found[name].to_dict()[field] == value
    assert accepted > 20
    assert rejected > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format=2 and embeddings=False"),
        ({"format": 1.0}, r"format=1\.0 is unknown"),
        (
            {"heads": {"t": {"kind": "single_label"}, "u": {}}},
            "head 't' needs exactly dropout, kind, label_names",
        ),
        ({"base": {"module": "os", "class": "system", "name_or_path": ""}}, "base has module='os'"),
        ({"base": {"module": "transformers", "class": "a b", "name_or_path": ""}}, "base has class='a b'"),
    ],
)
def test_fields_that_do_not_fit(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    whole = json.loads((folder / "task_heads.json").read_text())
    (tmp_path / "task_heads.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(StorageError, match=message):
        read_description(tmp_path)


def test_a_pooling_without_effect_that_earlier_releases_saved(folder: Path, tmp_path: Path) -> None:
    whole = json.loads((folder / "task_heads.json").read_text())
    whole["heads"]["u"]["pooling"] = "first"
    (tmp_path / "task_heads.json").write_text(json.dumps(whole))
    assert read_description(tmp_path).heads["u"] == HeadConfig("token_tagging", 3)


@pytest.mark.parametrize(
    "text",
    ['\ufeff{"format": 1}', '{"format": ' + "9" * 5000 + "}", "[" * 100_000, '{"format": 1, "format": 1}', "\x00", ""],
    ids=["byte order mark", "huge integer", "deep", "twice", "zero byte", "empty"],
)
@pytest.mark.parametrize("file", ["task_heads.json", "tasks.json"])
def test_texts_that_are_no_json_of_ours(folder: Path, tmp_path: Path, text: str, file: str) -> None:
    heads = read_description(folder).heads
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(StorageError, match=f"{file} is damaged"):
        read_description(tmp_path) if file == "task_heads.json" else read_tasks(tmp_path, heads)


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "loop"])
@pytest.mark.parametrize("file", ["task_heads.json", "tasks.json", "heads.safetensors"])
def test_what_is_no_file(folder: Path, tmp_path: Path, file: str, kind: str) -> None:
    place = tmp_path / "folder"
    shutil.copytree(folder, place)
    path = place / file
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nothing" if kind == "dangling" else path.name)
    with pytest.raises(StorageError, match=f"{file} is (not there|neither a file nor a folder)"):
        TaskHeads.from_pretrained(place)
