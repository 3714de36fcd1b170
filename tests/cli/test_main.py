"""The command: from `train` to `info`, `predict` and `fold`, with tasks of one's own beside those of GLUE."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import pal_adapters
from pal_adapters.cli import main
from pal_adapters.cli.main import COMMANDS
from pal_adapters.multitask import Predictor, load_toy_task
from tests.examples.data import write_tasks

ROOT = Path(__file__).resolve().parents[2]
HOST = next(host for host in ("adapters", "peft") if host in sys.modules or find_spec(host))
TRAINED = ("mood", "rte", "tags", "topics")


def start(*options: str) -> int:
    try:
        return main(options)
    except SystemExit as stop:
        return int(stop.code or 0)


def write(folder: Path, fields: str, rows: list[dict[str, Any]], *splits: str) -> None:
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(fields, encoding="utf-8")
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLUE tasks, and tasks of one's own; two of these have no validation split."""
    root = tmp_path_factory.mktemp("data")
    write_tasks(root, train_size=40, test_size=15)
    _, splits = load_toy_task("sentiment", train_size=40, test_size=15)
    fields = "kind: single_label\ntext_columns: [sentence]\nlabel_names: [bad, good]\n"
    write(root / "mood", fields, splits["train"].to_list(), "train", "validation")
    words = [{"tokens": ["it", "was", "good"], "tags": [0, 1, 2]}] * 20
    write(root / "tags", "kind: token_tagging\nlabel_names: [O, B-X, I-X]\n", words, "train")
    topics = [{"text": f"it is {number}", "labels": [number % 2, 1]} for number in range(20)]
    fields = "kind: multi_label\ntext_columns: [text]\nlabel_column: labels\nlabel_names: [food, tea]\n"
    write(root / "topics", fields, topics, "train")
    return root


@pytest.fixture(scope="module")
def trained(data: Path, tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `train` wrote; a task of one's own is named by its folder, here or in --data_dir."""
    out = tmp_path_factory.mktemp("trained")
    options = ["--tasks", str(data / "mood"), "rte", "tags", "topics", "--data_dir", str(data), "--method", "pal"]
    options += ["--host", HOST, "--hidden_size", "12", "--model", tiny_encoder, "--output", str(out)]
    assert start("train", *options, "--max_steps", "2") == 0
    return out


def test_scores_are_a_table_without_warnings_of_the_host(
    data: Path, tiny_encoder: str, tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    options = ["--tasks", "mood", "tags", "--data_dir", str(data), "--method", "pal", "--hidden_size", "12"]
    options += ["--host", HOST, "--model", tiny_encoder, "--output", str(tmp_path), "--max_steps", "2"]
    assert start("train", *options) == 0
    captured = capsys.readouterr()
    rows = [line.split("  ") for line in captured.out.splitlines()]
    assert [cell.strip() for cell in rows[0] if cell.strip()][:4] == ["task", "split", "metric", "trivial"]
    assert any("mood" in row[0] and "accuracy" in "".join(row) for row in rows)
    assert any("held out of training" in "".join(row) for row in rows)
    assert "none are activated" not in captured.err + caplog.text
    last = captured.err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("100%"), "the bar ends complete"


def test_info_shows_methods_sizes_and_scores(trained: Path, capsys: Any) -> None:
    assert start("info", str(trained)) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads((trained / "results.json").read_text(encoding="utf-8"))
    for name in TRAINED:
        (line,) = [line for line in lines if line.startswith(name)]
        count, task = results["parameters"]["tasks"][name], results["tasks"][name]
        score = next(iter(task["metrics"].values()))[task["primary_metric"]]
        for cell in ("pal", f"{count['adapter']:,}", f"{count['head']:,}", task["primary_metric"], f"{score:.4f}"):
            assert cell in line.lower().replace("pal", "pal"), (cell, line)
    assert f"host: {HOST}" in lines[-1]


def test_predict_answers_a_text_for_all_tasks_that_read_one(trained: Path, capsys: Any) -> None:
    assert start("predict", str(trained), "--text", "it was good") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(one["task"] for one in found) == ["mood", "tags", "topics"]
    assert start("predict", str(trained), "--text", "it was good", "--tasks", "mood") == 0
    (again,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert again["scores"] == pytest.approx(next(one for one in found if one["task"] == "mood")["scores"], abs=1e-6)
    assert set(again["scores"]) == {"bad", "good"}


def test_predict_reads_and_writes_files(trained: Path, tmp_path: Path, capsys: Any) -> None:
    requests = [{"task": "rte", "sentence1": "a", "sentence2": "b"}, {"task": "mood", "sentence": "it was good"}]
    source, target = tmp_path / "requests.jsonl", tmp_path / "predictions.jsonl"
    source.write_text("\n".join(map(json.dumps, requests)) + "\n\n", encoding="utf-8")
    assert start("predict", str(trained), "--input", str(source), "--output", str(target)) == 0
    found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    expected = [one.to_dict() for one in Predictor.from_pretrained(trained / "adapters")(requests)]
    assert found == json.loads(json.dumps(expected))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"task": "rte"', "line 1: not JSON"),
        ('{"task": "mood", "sentence": "x"}\n\n{"task": "nope"}', "line 3 (task 'nope'): there is no task 'nope'"),
        ('{"task": "rte", "sentence1": "x"}', "line 1 (task 'rte'): there is no column 'sentence2'"),
        ("", "there are no requests"),
    ],
)
def test_bad_requests_name_their_line(trained: Path, tmp_path: Path, capsys: Any, content: str, message: str) -> None:
    (tmp_path / "requests.jsonl").write_text(content, encoding="utf-8")
    assert start("predict", str(trained), "--input", str(tmp_path / "requests.jsonl")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.skipif(HOST != "adapters", reason="needs adapters")
@pytest.mark.parametrize("host", ["adapters", "peft"])
def test_transfer_then_fold_gives_the_same_answers(
    data: Path, tiny_encoder: str, tmp_path: Path, capsys: Any, host: str
) -> None:
    options = ["--data_dir", str(data), "--sources", "rte", "cola", "--target", "mood", "--method", "scalearn"]
    options += ["--host", host, "--model", tiny_encoder, "--output", str(tmp_path / "out"), "--max_steps", "2"]
    assert start("transfer", *options, "--reduction_factor", "4") == 0
    assert start("fold", str(tmp_path / "out"), "--output", str(tmp_path / "plain")) == 0
    assert "folded: mood" in capsys.readouterr().out
    combined, plain = (Predictor.from_pretrained(tmp_path / name) for name in ("out/model", "plain"))
    texts = ["it was good.", "she is here and reads."]
    for one, other in zip(combined(texts, task="mood"), plain(texts, task="mood"), strict=True):
        assert other.scores == pytest.approx(one.scores, abs=1e-5)
    assert combined.tasks["mood"] == plain.tasks["mood"]
    assert start("info", str(tmp_path / "plain")) == 0
    assert ("bottleneck" if host == "adapters" else "LORA") in capsys.readouterr().out
    assert start("fold", str(tmp_path / "plain"), "--output", str(tmp_path / "again")) == 2
    assert "has no combinations to fold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "pal-adapters: error: no command; allowed: train, "),
        (("trian",), "pal-adapters: error: unknown command 'trian'; allowed: train, "),
        (("info", "/nowhere/at/all"), "pal-adapters info: error: "),
        (("predict", "x"), "pal-adapters predict: error: pass either --text or --input"),
        (("predict", "x", "--input", "/nowhere"), "pal-adapters predict: error: --input /nowhere: cannot be read"),
        (("run", "no_such_module"), "pal-adapters run: error: no module named 'no_such_module' is installed"),
        (("train", "--tasks", "rte"), "the following arguments are required: --method"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, capsys: Any) -> None:
    assert start(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_traceback_is_shown_on_request() -> None:
    with pytest.raises(ValueError, match="pass either --text or --input"):
        main(["predict", "x", "--traceback"])


def test_help_lists_commands_and_choices(capsys: Any) -> None:
    assert start("--help") == 0
    listed = capsys.readouterr().out
    for command in COMMANDS:
        assert command in listed
        assert start(command, "--help") == 0
        assert f"usage: pal-adapters {command}" in capsys.readouterr().out
    assert start("train", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "{pal,low_rank,top_attention,lhuc,houlsby,houlsby_pal,ca_mtl_base,ca_mtl_large,full,head}" in shown
    assert "{adapters,peft}" in shown


EXTRA = ("adapters", "peft", "datasets", "evaluate", "fastapi", "pandas", "prometheus_client", "tabulate", "uvicorn")
BLOCKED = f"""
import importlib.util, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRA!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in {EXTRA!r} else find(name, *more)
from pal_adapters.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (("--help",), 0, "answer requests over HTTP"),
        (("serve", "--help"), 0, "--max_batch"),
        (("serve", "out", "--port", "70000"), 2, "--port 70000 is not allowed"),
        (("serve", "out", "--max_batch", "0"), 2, "max_batch=0"),
        (("serve", "out"), 2, "pip install -e '.[all]'"),
    ],
)
def test_serve_explains_itself_without_the_extras(arguments: tuple[str, ...], status: int, shown: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_version(capsys: Any) -> None:
    assert start("--version") == 0
    assert capsys.readouterr().out == f"pal-adapters {pal_adapters.__version__}\n"


def test_run_starts_a_module_with_the_package_imported(tmp_path: Path, importable: None) -> None:
    (tmp_path / "tool.py").write_text(
        "import sys\nprint(__name__, 'pal_adapters' in sys.modules, sys.argv[1:])\nsys.exit(7)\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pal_adapters", "run", "tool", "--traceback", "-h"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 7
    assert done.stdout == "__main__ True ['--traceback', '-h']\n"
