"""The whole job on tiny data: every recipe, and what is rejected. Killed runs: `tests/robustness/test_kills.py`."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .data import write, write_tasks

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_tasks(root, train_size=60, test_size=12)
    sizes = {"train": 30, "validation_matched": 6, "validation_mismatched": 6}
    write(
        root / "glue" / "mnli",
        {
            split: [{"premise": f"it is {i}.", "hypothesis": f"it was {i % 4}.", "label": i % 3} for i in range(size)]
            for split, size in sizes.items()
        },
    )
    return root


def options(data: Path, encoder: str, output: Path, *more: str) -> list[str]:
    common = ["--data_dir", str(data), "--model", encoder, "--output_dir", str(output), "--max_steps", "8"]
    common += ["--batch_size", "4", "--max_length", "48", "--evaluations", "4"]
    return [*common, "--tasks", "rte", "cola", "stsb", *more]


@pytest.mark.parametrize(
    "choice",
    [
        ("pals", "--hidden_size", "12"),
        ("pals_frozen", "--hidden_size", "12", "--sampling", "proportional"),
        ("full_single", "--bf16", "--evaluations", "1"),
        ("ca_mtl",),
        ("ca_mtl", "--sampling", "proportional"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore::pal_adapters.multitask.RecipeWarning"
)  # other sampling; one block, half of it is 0
def test_whole_job(glue: ModuleType, data: Path, tiny_encoder: str, tmp_path: Path, capsys: Any, choice: Any) -> None:
    first = options(data, tiny_encoder, tmp_path / "one", "--preset", *choice)
    assert glue.main(first) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert set(results["scores"]) == {"rte", "cola", "stsb"}
    assert set(results["scores"]["stsb"]) == {"pearson", "spearman"}
    primary = [next(iter(metrics.values())) for metrics in results["scores"].values()]
    assert results["average"] == pytest.approx(sum(primary) / 3)
    assert f"average first metrics {results['average']:.4f}" in " ".join(printed.split())
    lines = (data / "glue" / "rte" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    trivial = results["baseline"]["rte"]["accuracy"]
    assert trivial in (sum(labels) / len(labels), 1 - sum(labels) / len(labels))
    assert results["baseline"]["cola"]["matthews"] == results["baseline"]["stsb"]["pearson"] == 0
    assert f"rte accuracy {results['scores']['rte']['accuracy']:.4f} {trivial:.4f}" in " ".join(printed.split())
    assert results["steps"] == (24 if choice[0] == "full_single" else 8)
    if choice[0] != "full_single":
        assert results["rows"]["trained"] == 32
        assert results["rows"]["of_one_pass"] == 3 * 54
    if choice == ("ca_mtl",):
        assert results["rows"]["candidates"] == 3 * 32
        assert sum(results["rows"]["chosen"].values()) == 32
    evaluations = 1 if "--evaluations" in choice else 4
    folder = tmp_path / "one" / ("rte" if choice[0] == "full_single" else ".")
    assert len(json.loads((folder / "done.json").read_text())["dev"]) == evaluations
    base = results["parameters"]["base"]
    per_task = results["parameters"]["trained_per_task"]
    if choice[0] != "ca_mtl":  # this base is smaller than one network
        assert (per_task > 0.9 * base) is (choice[0] == "full_single")
    assert (tmp_path / "one" / "pareto.png").stat().st_size > 1000
    # The finished run is not done again, and other runs come into the picture.
    before = (tmp_path / "one" / "pareto.png").read_bytes()
    assert glue.main([*first, "--compare", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == results
    assert before


def test_task_with_two_validation_splits(glue: ModuleType, data: Path, tiny_encoder: str, tmp_path: Path) -> None:
    given = options(
        data, tiny_encoder, tmp_path, "--preset", "full", "--tasks", "mnli", "rte", "--max_train_rows", "20"
    )
    assert glue.main(given) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(name, list(metrics)) for name, metrics in results["scores"].items()] == [
        ("mnli", ["accuracy"]),
        ("mnli_mismatched", ["accuracy"]),
        ("rte", ["accuracy"]),
    ]
    scores = [results["scores"][name]["accuracy"] for name in ("mnli", "rte")]
    assert results["average"] == pytest.approx(sum(scores) / 2)


@pytest.mark.parametrize(("given", "corrects"), [((), False), (("--adam_bias_correction",), True)])
def test_bias_correction_is_the_recipes_unless_given(
    glue: ModuleType, data: Path, tiny_encoder: str, tmp_path: Path, monkeypatch: Any, given: Any, corrects: bool
) -> None:
    class Stop(Exception): ...

    def trainer(model: Any, arguments: Any, *_: Any, **__: Any) -> None:
        assert arguments.adam_bias_correction is corrects
        raise Stop

    monkeypatch.setattr(glue, "MultiTaskTrainer", trainer)
    with pytest.raises(Stop):
        glue.main(options(data, tiny_encoder, tmp_path, "--preset", "full", *given))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--preset", "palls"), "preset='palls' is not allowed: use one of 'pals'"),
        (("--preset", "full", "--tasks", "rte", "rte"), "--tasks: rte is named twice"),
        (("--preset", "full", "--tasks", "nli"), "unknown task 'nli'"),
        (("--preset", "full", "--model", "/nowhere"), "--model /nowhere: cannot be loaded"),
        (("--preset", "full", "--data_dir", "/nowhere"), "data_dir /nowhere is not a folder"),
    ],
)
def test_what_is_refused(
    glue: ModuleType, data: Path, tiny_encoder: str, tmp_path: Path, capsys: Any, more: Any, message: str
) -> None:
    assert glue.main([*options(data, tiny_encoder, tmp_path / "out"), *more]) == 2
    problem = capsys.readouterr().err
    assert message in problem
    assert problem.count("\n") == 1


def test_folder_of_another_run(glue: ModuleType, data: Path, tiny_encoder: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"preset": "pals"}))
    assert glue.main(options(data, tiny_encoder, tmp_path, "--preset", "full")) == 2
    assert "contains a run with" in capsys.readouterr().err


def test_picture_of_sampling(sampling_picture: ModuleType, tmp_path: Path) -> None:
    sampling_picture.draw(tmp_path / "picture.png", epochs=3)
    assert (tmp_path / "picture.png").stat().st_size > 1000
