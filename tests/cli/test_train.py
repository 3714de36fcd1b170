from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
from safetensors import safe_open

from pal_adapters.cli import main
from tests.examples.data import write, write_tasks
from tests.processes import python

RTE = ("--tasks", "rte", "--method")
ROOT = Path(__file__).resolve().parents[2]
HOSTED = ("pal", "low_rank", "top_attention", "lhuc", "houlsby", "houlsby_pal")
INSTALLED = [host for host in ("adapters", "peft") if host in sys.modules or find_spec(host)]
CASES = [(method, host) for method in HOSTED for host in INSTALLED] + [("full", None), ("head", None)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_tasks(root, train_size=40, test_size=15)
    return root


@pytest.mark.parametrize("host", INSTALLED)
@pytest.mark.parametrize(("method", "sampling"), [("ca_mtl_base", "mt_uncertainty"), ("ca_mtl_large", "proportional")])
def test_one_network_for_all_tasks(start: Any, tmp_path: Path, method: str, sampling: str, host: str) -> None:
    options = ("--sampling", sampling, "--host", host, "--max_steps", "3", "--batch_size", "4", "--max_length", "48")
    assert start("--tasks", "rte", "stsb", "copa", "--method", method, *options) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["tasks"]) == {"rte", "stsb", "copa"}
    assert results["sampling"]["updates"] == 3
    assert results["sampling"]["rows_trained"] == 12
    assert results["sampling"]["candidates_forward"] == (36 if sampling == "mt_uncertainty" else 0)
    assert results["parameters"]["tasks"]["rte"]["adapter"] == 24
    assert list((tmp_path / "out" / "adapters" / "tasks").glob("*.safetensors"))


def test_options_of_networks_are_refused_elsewhere(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(*RTE, "pal", "--sampling", "proportional") == 2
    assert "--sampling has no effect with --method pal" in capsys.readouterr().err
    assert start(*RTE, "ca_mtl_base", "--joint") == 2
    assert "--joint has no effect with --method ca_mtl_base" in capsys.readouterr().err


@pytest.fixture
def start(data: Path, tiny_encoder: str, tmp_path: Path) -> Any:
    """Runs the script in this process."""

    def run(*options: str, model: str | None = None) -> int:
        common = ["--data_dir", str(data), "--output_dir", str(tmp_path / "out"), "--model", model or tiny_encoder]
        try:
            return main(["train", *common, *options])
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


def options_of(method: str, host: str | None) -> list[str]:
    options = ["--method", method, *(["--host", host] if host else [])]
    return options + (["--hidden_size", "12"] if method in HOSTED and method != "lhuc" else [])


@pytest.mark.parametrize(("method", "host"), CASES)
def test_every_method_in_every_host(start: Any, tmp_path: Path, method: str, host: str | None, capsys: Any) -> None:
    assert start("--tasks", "rte", "STS-B", "--max_steps", "2", *options_of(method, host)) == 0
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["method"] == method
    assert results["config"]["host"] == host
    assert results["config"]["seed"] == 42
    assert set(results["tasks"]) == {"rte", "stsb"}
    assert {"python", "torch", "transformers", "datasets"} <= set(results["versions"])
    for name, metric in (("rte", "accuracy"), ("stsb", "pearson")):
        task, count = results["tasks"][name], results["parameters"]["tasks"][name]
        assert task["rows"] == {"train": 36, "dev": 4, "validation": 15}
        assert task["primary_metric"] == metric
        assert -1 <= task["metrics"]["validation"][metric] <= 1
        assert task["seconds"] > 0
        assert task["steps"] == 2
        assert count["share_of_base"] == pytest.approx(count["trainable"] / results["parameters"]["base_total"])
        if method != "full":
            assert count["trainable"] == count["adapter"] + count["head"]
        assert (count["adapter"] > 0) is (method in HOSTED)
        folder = out / "adapters" / name
        assert not [*folder.glob("*.bin"), *folder.glob("*.pt")]
        with safe_open(folder / "head.safetensors", "pt") as head:
            assert head.get_tensor("weight").shape == (2 if name == "rte" else 1, 24)
        assert len(list(folder.glob("*.safetensors"))) == (1 if method == "head" else 2)
    assert results["parameters"]["base_trained"] > 0 if method == "full" else not results["parameters"]["base_trained"]
    # Eight of the fifteen test rows have label 0 (they take turns), and both classes are equally frequent in training.
    assert results["tasks"]["rte"]["baseline"]["validation"]["accuracy"] in (
        pytest.approx(8 / 15),
        pytest.approx(7 / 15),
    )
    assert results["tasks"]["stsb"]["baseline"]["validation"] == {"pearson": 0.0, "spearman": 0.0}
    printed = capsys.readouterr().out
    for cell in ("task", "rte", "stsb", "pearson", "spearman", f"{results['parameters']['base_total']:,}"):
        assert cell in printed


@pytest.mark.parametrize(("method", "host"), [case for case in CASES if case[0] in ("pal", "houlsby", "full")])
def test_joint(start: Any, tmp_path: Path, method: str, host: str | None) -> None:
    assert start("--tasks", "rte", "stsb", "cola", "--joint", "--epochs", "2", *options_of(method, host)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    steps = [task["steps"] for task in results["tasks"].values()]
    assert sum(steps) == 2 * 3 * 3  # 36 rows a task in batches of 16
    assert results["parameters"]["base_trained"] > 0
    assert results["config"]["learning_rate"] == 1e-4
    own_base = method == "full" or (method, host) == ("houlsby", "adapters")
    assert (tmp_path / "out" / "base" / "model.safetensors").is_file() is own_base
    for name in ("rte", "stsb", "cola"):
        assert (tmp_path / "out" / "adapters" / name / "head.safetensors").is_file()


def test_two_choices(start: Any, tmp_path: Path) -> None:
    assert start("--tasks", "copa", "--method", "head", "--epochs", "1") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["tasks"]["copa"]["rows"] == {"train": 18, "dev": 2, "validation": 9}
    with safe_open(tmp_path / "out" / "adapters" / "copa" / "head.safetensors", "pt") as head:
        assert head.get_tensor("weight").shape == (1, 24)


def test_a_task_is_trained_alike_alone_and_behind_others(start: Any, tmp_path: Path) -> None:
    scores = []
    for tasks in (["stsb"], ["rte", "stsb"]):
        assert start("--tasks", *tasks, "--epochs", "2", *options_of("pal", INSTALLED[0])) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
        scores.append(results["tasks"]["stsb"]["metrics"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "foo", "--method", "head"], "unknown task 'foo'; allowed: boolq, cb, cola"),
        (["--tasks", "boolq", "--method", "head"], "task 'boolq': no folder"),
        (["--tasks", "rte", "RTE", "--method", "head"], "--tasks: rte is named twice"),
        ([*RTE, "lora"], "argument --method: invalid choice: 'lora'"),
        (["--tasks", "rte"], "the following arguments are required: --method"),
        ([*RTE, "pal", "--host", "x"], "argument --host: invalid choice: 'x'"),
        ([*RTE, "full", "--host", "peft"], "--host has no effect with --method full"),
        ([*RTE, "head", "--host", "peft"], "--host has no effect with --method head"),
        ([*RTE, "head", "--joint"], "--joint cannot be combined with --method head"),
        ([*RTE, "lhuc", "--hidden_size", "8"], "--hidden_size has no effect with --method lhuc"),
        ([*RTE, "full", "--hidden_size", "8"], "--hidden_size has no effect with --method full"),
        ([*RTE, "head", "--hidden_size", "8"], "--hidden_size has no effect with --method head"),
        ([*RTE, "head", "--epochs", "0"], "--epochs: got '0'; allowed: an integer of at least 1"),
        ([*RTE, "head", "--max_steps", "-3"], "--max_steps/--max-steps: got '-3'"),
        ([*RTE, "head", "--batch_size", "x"], "--batch_size/--batch-size: got 'x'"),
        ([*RTE, "head", "--learning_rate", "nan"], "--learning_rate/--learning-rate: got 'nan'; allowed: a number"),
        ([*RTE, "head", "--seed", "-1"], "--seed: got '-1'; allowed: an integer from 0 to"),
        ([*RTE, "head", "--max_length", "1000"], "--max_length 1000: allowed for this model: 5 to 128"),
        ([*RTE, "head", "--max_length", "4"], "--max_length 4: allowed for this model: 5 to 128"),
        ([*RTE, "head", "--pooling", "max"], "argument --pooling: invalid choice: 'max'"),
        ([*RTE, "head", "--output_dir", __file__], "cannot be made (File exists)"),
        ([*RTE, "head", "--data_dir", "/nowhere"], "data_dir /nowhere is not a folder"),
        ([*RTE, "pal", "--hidden_size", "7"], "--method pal: hidden_size=7"),
        ([*RTE, "head", "--what"], "unrecognized arguments: --what"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(start: Any, capsys: Any, options: list[str], message: str) -> None:
    assert start(*options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pal-adapters train: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_bad_models_are_one_line(start: Any, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert start("--tasks", "rte", "--method", "head", model=str(tmp_path / "empty")) == 2
    captured = capsys.readouterr()
    assert f"--model {tmp_path / 'empty'}: cannot be loaded" in captured.err
    assert captured.err.count("\n") == 1


def test_bad_rows_are_one_line(start: Any, capsys: Any, tmp_path: Path) -> None:
    rows = [{"sentence": "a.", "label": 0}, {"sentence": "b.", "label": 7}]
    write(tmp_path / "data" / "sst2", {"train": rows, "validation": rows})
    assert start("--tasks", "sst2", "--method", "head", "--data_dir", str(tmp_path / "data")) == 2
    captured = capsys.readouterr()
    path = tmp_path / "data" / "sst2" / "train.jsonl"
    assert f"{path}, row 2: label 7 is out of range: allowed are 0 to 1" in captured.err
    assert captured.err.count("\n") == 1


def test_without_a_folder_the_hub_is_asked(
    data: Path,
    tiny_encoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    options = ["--tasks", "rte", "--method", "head", "--model", tiny_encoder, "--output_dir", str(tmp_path / "out")]
    files = {split: str(data / "glue" / "rte" / f"{split}.jsonl") for split in ("train", "validation")}
    local, asked = datasets.load_dataset, []

    def from_hub(*names: str) -> Any:
        asked.append(names)
        return local("json", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    assert main(["train", *options, "--epochs", "1"]) == 0
    assert asked == [("nyu-mll/glue", "rte")]

    def no_network(*names: str) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    capsys.readouterr()
    assert main(["train", *options]) == 2
    error = capsys.readouterr().err
    assert "cannot load nyu-mll/glue (rte) from the Hub (no network); set data_dir to read local files" in error
    assert error.count("\n") == 1


def test_as_a_command(data: Path, tmp_path: Path, importable: None) -> None:
    options = ["--data_dir", data, "--tasks", "nope", "--method", "pal", "--output_dir", tmp_path]
    done = python(ROOT / "examples" / "train_tasks.py", *options)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "pal-adapters train: error: unknown task 'nope'" in done.stderr
