from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import Task, TaskDataError, train_dev_split

RTE = [
    {"sentence1": "A dog barks.", "sentence2": "An animal barks.", "label": 0, "idx": 0},
    {"sentence1": "A dog barks.", "sentence2": "A cat barks.", "label": 1, "idx": 1},
]
STSB = [
    {"sentence1": "A.", "sentence2": "B.", "label": 5, "idx": 0},
    {"sentence1": "C.", "sentence2": "D.", "label": 2, "idx": 1},
]


def write(path: Path, rows: list[Any] | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz" and not isinstance(rows, bytes):
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


def write_task(folder: Path, rows: list[Any], suffix: str = ".jsonl", validation: str = "validation") -> Path:
    write(folder / f"train{suffix}", rows)
    write(folder / f"{validation}{suffix}", rows)
    return folder


def one_line(error: pytest.ExceptionInfo[TaskDataError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("below", ["", "glue"])
def test_loads_both_layouts_and_both_suffixes(tmp_path: Path, suffix: str, below: str) -> None:
    write_task(tmp_path / below / "rte", RTE, suffix)
    task = Task.named("RTE", tmp_path)
    splits = task.dataset
    assert task.full_name == "glue/rte"
    assert list(splits) == ["train", "validation"]
    assert splits["train"].to_list() == RTE
    assert splits["train"].features["label"] == datasets.Value("int64")


def test_folder_of_one_benchmark_says_which_rte_it_is(tmp_path: Path) -> None:
    rows = [{"premise": "A.", "hypothesis": "B.", "label": 1}]
    write_task(tmp_path / "super_glue" / "rte", rows)
    assert Task.named("rte", tmp_path / "super_glue").full_name == "super_glue/rte"
    assert Task.named("rte", tmp_path).full_name == "super_glue/rte"
    write_task(tmp_path / "glue" / "rte", RTE)
    assert Task.named("rte", tmp_path).full_name == "glue/rte"
    assert Task.named("super_glue/rte", tmp_path).full_name == "super_glue/rte"


def test_regression_labels_are_floats_even_if_all_are_whole(tmp_path: Path) -> None:
    write_task(tmp_path / "stsb", STSB)
    splits = Task.named("stsb", tmp_path).dataset
    assert splits["train"].features["label"] == datasets.Value("float64")
    assert [type(label) for label in splits["train"]["label"]] == [float, float]
    assert splits["train"]["label"][:] == [5.0, 2.0]


def test_mnli_has_two_validation_splits_and_needs_one(tmp_path: Path) -> None:
    rows = [{"premise": "A.", "hypothesis": "B.", "label": 2}]
    folder = write_task(tmp_path / "mnli", rows, validation="validation_matched")
    assert list(Task.named("mnli", tmp_path).dataset) == ["train", "validation_matched"]
    write(folder / "validation_mismatched.jsonl", rows * 2)
    assert {name: len(split) for name, split in Task.named("mnli", tmp_path).dataset.items()} == {
        "train": 1,
        "validation_matched": 1,
        "validation_mismatched": 2,
    }


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    write_task(tmp_path / "rte", RTE)
    assert Task.named("rte", tmp_path).dataset["train"]["label"][:] == [0, 1]
    write_task(tmp_path / "rte", [row | {"label": 1 - row["label"]} for row in RTE])
    assert Task.named("rte", tmp_path).dataset["train"]["label"][:] == [1, 0]


def test_only_needed_columns_are_asked_for(tmp_path: Path) -> None:
    write_task(tmp_path / "rte", [{"sentence1": "A.", "sentence2": "B.", "label": 1}])
    assert Task.named("rte", tmp_path).dataset["train"].column_names == ["sentence1", "sentence2", "label"]


def test_progress_bars_of_the_host_are_left_as_they_were(tmp_path: Path) -> None:
    write_task(tmp_path / "rte", RTE)
    before = datasets.are_progress_bars_disabled()
    Task.named("rte", tmp_path)
    assert datasets.are_progress_bars_disabled() is before


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError) as error:
        Task.named("nope", tmp_path)
    assert "unknown task 'nope'; allowed: boolq, cb, cola" in one_line(error)


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError) as error:
        Task.named("rte", tmp_path / "nowhere")
    assert one_line(error) == f"data_dir {tmp_path / 'nowhere'} is not a folder"
    with pytest.raises(TaskDataError) as error:
        Task.named("boolq", tmp_path)
    assert one_line(error) == f"task 'boolq': no folder {tmp_path / 'super_glue' / 'boolq'} or {tmp_path / 'boolq'}"
    write(tmp_path / "boolq" / "validation.jsonl", [{"question": "q", "passage": "p", "label": 1}])
    with pytest.raises(TaskDataError) as error:
        Task.named("boolq", tmp_path)
    start = f"task 'boolq': {tmp_path / 'boolq'} has no split 'train'; found: validation (files end in .jsonl, .json, "
    assert one_line(error).startswith(start)
    write(tmp_path / "rte" / "train.jsonl", RTE)
    with pytest.raises(TaskDataError) as error:
        Task.named("rte", tmp_path)
    assert f"{tmp_path / 'rte'} has no split 'validation'; found: train" in one_line(error)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "rte", RTE)
    write_task(tmp_path / "rte", RTE, ".jsonl.gz")
    with pytest.raises(TaskDataError) as error:
        Task.named("rte", tmp_path)
    first = tmp_path / "rte" / "train.jsonl"
    assert f"two files for the split 'train': {first} and train.jsonl.gz; keep one of them" in one_line(error)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("rte", [], "no rows"),
        ("rte", b"\n\n", "no rows"),
        ("rte", [*RTE, [1]], "each row must be an object with columns"),
        ("rte", [RTE[0], {"sentence1": "A.", "label": 0}], "row 2: column 'sentence2' holds None, not a text"),
        ("rte", [{"sentence1": "A.", "label": 0}], "no column 'sentence2'; found: sentence1, label"),
        ("rte", [{"sentence1": "A.", "sentence2": "B."}], "no column 'label'"),
        ("rte", [RTE[0] | {"sentence1": None}], "row 1: column 'sentence1' holds None, not a text"),
        ("rte", [RTE[0], RTE[1] | {"label": 2}], "row 2: label 2 is out of range: allowed are 0 to 1"),
        ("rte", [RTE[0] | {"label": -1}], "row 1: label -1 is out of range"),
        ("rte", [RTE[0] | {"label": "0"}], "row 1: label '0' is not one of label_names: 'entail"),
        ("rte", [RTE[0] | {"label": 1.0}], "row 1: label 1.0 is of type float, not an integer"),
        ("rte", [RTE[0] | {"label": True}], "row 1: label True is of type bool, not an integer"),
        ("rte", [RTE[0] | {"label": None}], "row 1: label None is of type NoneType, not an inte"),
        ("stsb", [STSB[0] | {"label": 5.5}], "row 1: label 5.5 is out of range: allowed are 0.0 to 5.0"),
        ("stsb", [STSB[0] | {"label": float("nan")}], "row 1: label nan is not a finite number"),
        ("stsb", [STSB[0] | {"label": "4"}], "row 1: label '4' is not a finite number"),
        ("rte", b'{"sentence1": "A."\n', "cannot be read (JSON parse error: Missing a comma"),
        ("rte", json.dumps(RTE[0]).encode() + b"\n\n{]\n", "cannot be read (JSON parse error: Missing a name"),
        ("rte", b"\xff\xfe\x00", "cannot be read (JSON parse error: Invalid value"),
        ("copa", [{"premise": "A", "choice1": "B", "choice2": "C", "question": "why", "label": 0}],
         "row 1: column 'question' holds 'why'"),
        ("wsc", [{"text": "A b", "span1_text": "A", "span2_text": "b", "span2_index": 7, "label": 0}],
         "row 1: column 'span2_index' holds 7; allowed: 0 to 1"),
    ],
)  # fmt: skip
def test_bad_files_say_where_and_what(tmp_path: Path, task: str, rows: Any, message: str) -> None:
    good = {"rte": RTE, "stsb": STSB}.get(task)
    folder = tmp_path / task
    if good is None:
        path = write(folder / "train.jsonl", rows)
        write(folder / "validation.jsonl", rows)
    else:
        write(folder / "train.jsonl", good)
        path = write(folder / "validation.jsonl", rows)
    with pytest.raises(TaskDataError) as error:
        Task.named(task, tmp_path)
    assert re.match(rf"{re.escape(str(path))}(, row \d+)?: ", one_line(error))
    assert message in one_line(error)


@pytest.mark.parametrize("damage", ["not gzip", "cut off", "flipped"])
def test_broken_gzip(tmp_path: Path, damage: str) -> None:
    path = write_task(tmp_path / "rte", RTE * 50, ".jsonl.gz") / "train.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "not gzip": json.dumps(RTE[0]).encode(),
            "cut off": whole[:-20],
            "flipped": whole[:30] + bytes([whole[30] ^ 255]) + whole[31:],
        }[damage]
    )
    with pytest.raises(TaskDataError, match="cannot be read") as error:
        Task.named("rte", tmp_path)
    assert str(path) in one_line(error)


def test_columns_that_the_reader_cannot_unite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path / "rte", RTE)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("generation failed") from TypeError("cannot cast\nthis to that")

    monkeypatch.setattr(datasets, "load_dataset", fails)  # how it ends depends on the version of the reader
    with pytest.raises(TaskDataError) as error:
        Task.named("rte", tmp_path)
    assert one_line(error).startswith(f"{tmp_path / 'rte' / 'train.jsonl'}: cannot be read (cannot cast)")


def hub(rows: list[dict[str, Any]], label: Any, splits: tuple[str, ...] = ("train", "validation", "test")) -> Any:
    features = datasets.Features(
        {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"), "label": label}
    )
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.DatasetDict({split: datasets.Dataset.from_dict(columns, features=features) for split in splits})


def test_without_a_folder_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    names = datasets.ClassLabel(names=["entailment", "not_entailment"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **_: asked.append(args) or hub(RTE, names))
    task = Task.named("rte")
    splits = task.dataset
    assert asked == [("nyu-mll/glue", "rte")]
    assert list(splits) == ["train", "validation"]
    assert splits["train"].features["label"] == datasets.Value("int64")
    assert task.full_name == "glue/rte"
    with pytest.raises(TaskDataError, match=r"aps/super_glue \(rte, train\): no column 'premise'"):
        Task.named("super_glue/rte")  # the rows have the columns of the other one
    assert asked[1] == ("aps/super_glue", "rte")


def test_troubles_with_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(TaskDataError) as error:
        Task.named("stsb")
    assert one_line(error) == (
        "task 'stsb': cannot load nyu-mll/glue (stsb) from the Hub (no network); set data_dir to read local files"
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub(RTE, datasets.Value("int64"), ("train",)))
    with pytest.raises(TaskDataError, match="no split 'validation'; found: train"):
        Task.named("rte")


def dataset(labels: list[int] | list[float], **columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"label": labels, "row": list(range(len(labels))), **columns})


def test_split_keeps_the_shares_of_the_classes() -> None:
    whole = dataset([0] * 60 + [1] * 30 + [2] * 10)
    train, dev = train_dev_split(whole, 0.1, seed=3)
    assert Counter(dev["label"]) == {0: 6, 1: 3, 2: 1}
    assert sorted(train["row"][:] + dev["row"][:]) == list(range(100))
    assert train["row"][:] == sorted(train["row"])


def test_split_takes_one_row_of_a_rare_class() -> None:
    _, dev = train_dev_split(dataset([0] * 20 + [1] * 3 + [2]), 0.1)
    assert Counter(dev["label"]) == {0: 2, 1: 1}


def test_split_depends_on_the_seed_only() -> None:
    whole = dataset([0, 1] * 50)
    first, again, other = (train_dev_split(whole, seed=seed)[1]["row"][:] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_split_of_a_regression() -> None:
    train, dev = train_dev_split(dataset([i / 10 for i in range(50)]), 0.1)
    assert (len(train), len(dev)) == (45, 5)
    assert dev.features["label"].dtype == "float64"


def test_split_keeps_groups_together() -> None:
    whole = dataset([0, 1] * 30, text=[str(i // 6) for i in range(60)])
    train, dev = train_dev_split(whole, 0.1, split_columns=("text",))
    assert len(dev) == 6
    assert not set(train["text"]) & set(dev["text"])


@pytest.mark.parametrize("labels", [[0], [0, 1], [0.5]])
def test_split_of_too_few_rows(labels: list[Any]) -> None:
    with pytest.raises(TaskDataError, match=f"a training set of {len(labels)} examples cannot be split in two"):
        train_dev_split(dataset(labels))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2])
def test_split_refuses_a_fraction_that_is_none(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"fraction=.* is not allowed: use a positive number above 0, below 1"):
        train_dev_split(dataset([0, 1] * 10), fraction)
