from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pal_adapters.cli import main
from tests.examples.data import write_tasks
from tests.processes import python

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif("adapters" not in sys.modules and find_spec("adapters") is None, reason="adapters")
METHODS = ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp", "fusion", "average", "single")
# For two sources at 2 blocks of width 24: coefficients, and the bottlenecks of width 6 of `single`.
COUNTS = {
    "scalearn": 96, "scalearn_uniform": 4, "scalearn_pp": 48, "scalearn_uniform_pp": 2,
    "fusion": 2 * (3 * 24 * 24 + 2 * 24), "average": 0, "single": 2 * (2 * 6 * 24 + 6 + 24),
}  # fmt: skip
COMMON = ["--max_steps", "2", "--reduction_factor", "4", "--batch_size", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_tasks(root, train_size=40, test_size=15)
    return root


def start(*options: str) -> int:
    """Runs the command in this process."""
    try:
        return main(["transfer", *options])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def sources(data: Path, tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources that were trained once."""
    root = tmp_path_factory.mktemp("trained")
    options = ["--data_dir", str(data), "--model", tiny_encoder, "--sources", "rte", "STS-B", "--target", "cola"]
    options += ["--method", "average", "--output_dir", str(root / "out"), "--source_dir", str(root / "sources")]
    assert start(*options, *COMMON) == 0
    results = json.loads((root / "out" / "results.json").read_text(encoding="utf-8"))
    assert [results["sources"][name]["trained_here"] for name in ("rte", "stsb")] == [True, True]
    return root / "sources"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["rte", "copa"])
def test_every_method(
    method: str, target: str, data: Path, tiny_encoder: str, sources: Path, tmp_path: Path,
    capsys: Any,
) -> None:  # fmt: skip
    before = {p: p.read_bytes() for p in sources.rglob("*") if p.is_file()}
    options = ["--data_dir", str(data), "--model", tiny_encoder, "--sources", "rte", "stsb", "--target", target]
    options += ["--method", method, "--output_dir", str(tmp_path), "--source_dir", str(sources)]
    assert start(*options, *COMMON) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    found = results["target"]
    assert found["parameters"] == {"transfer": COUNTS[method], "head": 50 if target == "rte" else 25}
    assert found["steps"] == 2
    assert set(found["metrics"]["validation"]) == {"accuracy"}
    assert found["rows"]["train"] == (36 if target == "rte" else 18)
    for folder in ("target", "folded"):
        if folder == "folded" and method in ("fusion", "single"):
            assert not (tmp_path / folder).exists()
            assert found["folded"]["reason"]
            continue
        with safe_open(tmp_path / folder / target / "head.safetensors", "pt") as head:
            assert head.get_tensor("weight").shape == (2 if target == "rte" else 1, 24)
    if method == "single":
        assert not results["sources"]
        assert not (tmp_path / "transfer.png").exists()
    else:
        assert not any(source["trained_here"] for source in results["sources"].values())
        assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "transfer.svg").is_file()
        shared = method.endswith("_pp") or method == "average"
        assert found["transfer"]["places"] == (["all"] if shared else ["0", "1"])
        assert found["transfer"]["sources"] == ["rte", "stsb"]
    if "reason" not in found["folded"]:
        assert found["folded"]["same_predictions"] is True
        assert found["folded"]["largest_logit_difference"] < 1e-5
        assert found["folded"]["metrics"] == found["metrics"]
        assert found["folded"]["widths"] == {"0.output_adapter": 12, "1.output_adapter": 12}
    assert {p: p.read_bytes() for p in sources.rglob("*") if p.is_file()} == before
    printed = capsys.readouterr().out
    for part in (f"{COUNTS[method]:,} parameters of {method}", "target", "folded"):
        assert part in printed


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_in_peft(data: Path, tiny_encoder: str, tmp_path: Path) -> None:
    counts = {
        "scalearn": 2 * 2 * 2 * 24,
        "scalearn_uniform_pp": 2,
        "fusion": 2 * 2 * (3 * 24 * 24 + 2 * 24),
        "average": 0,
    }
    for number, (method, count) in enumerate(counts.items()):
        options = ["--data_dir", str(data), "--model", tiny_encoder, "--sources", "rte", "stsb", "--target", "rte"]
        options += ["--method", method, "--host", "peft", "--output_dir", str(tmp_path / method)]
        options += ["--source_dir", str(tmp_path / "sources"), "--source_learning_rate", "0.05", *COMMON]
        assert start(*options) == 0
        results = json.loads((tmp_path / method / "results.json").read_text(encoding="utf-8"))
        assert results["target"]["parameters"] == {"transfer": count, "head": 50}
        assert results["sources"]["rte"]["trained_here"] is (number == 0)
        folded = results["target"]["folded"]
        assert ("reason" in folded) is (method == "fusion")
        if method != "fusion":
            assert folded["same_predictions"] is True
            saved = json.loads(
                (tmp_path / method / "folded" / "rte" / "adapter_config.json").read_text(encoding="utf-8")
            )
            assert saved["peft_type"] == "LORA"
            assert saved["r"] == 2 * 6
        assert (tmp_path / method / "transfer.png").is_file()


def test_the_folded_adapter_is_plain(data: Path, tiny_encoder: str, sources: Path, tmp_path: Path) -> None:
    import adapters
    import torch
    from transformers import AutoModel

    options = ["--data_dir", str(data), "--model", tiny_encoder, "--sources", "rte", "stsb", "--target", "copa"]
    options += ["--method", "scalearn", "--output_dir", str(tmp_path), "--source_dir", str(sources), *COMMON]
    assert start(*options) == 0
    base = AutoModel.from_pretrained(tiny_encoder)
    adapters.init(base)
    assert base.load_adapter(str(tmp_path / "folded" / "copa"), set_active=True, use_safetensors=True) == "copa_folded"
    saved = json.loads((tmp_path / "folded" / "copa" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["config"].get("architecture") is None
    with torch.no_grad():
        assert base(input_ids=torch.tensor([[2, 5, 3]])).last_hidden_state.isfinite().all()


def test_seeds(data: Path, tiny_encoder: str, sources: Path, tmp_path: Path) -> None:
    histories = []
    for seed in ("0", "0", "1"):
        options = ["--data_dir", str(data), "--model", tiny_encoder, "--sources", "rte", "stsb", "--target", "stsb"]
        options += ["--method", "scalearn_pp", "--output_dir", str(tmp_path), "--source_dir", str(sources)]
        assert start(*options, *COMMON, "--epochs", "2", "--seed", seed) == 0
        with safe_open(tmp_path / "target" / "stsb" / "head.safetensors", "pt") as head:
            histories.append(head.get_tensor("weight"))
    assert histories[0].equal(histories[1])
    assert not histories[0].equal(histories[2])


BAD = [
    (["--sources", "rte", "RTE"], "--sources: rte is named twice"),
    (["--sources", "rte", "--target", "foo"], "unknown task 'foo'"),
    (["--sources", "boolq"], "task 'boolq': no folder"),
    (["--method", "scalearn"], "--sources is needed with --method scalearn"),
    (["--sources", "rte", "--method", "lora"], "argument --method: invalid choice: 'lora'"),
    (["--method", "single", "--source_epochs", "2"], "--source_epochs has no effect with --method single"),
    (["--sources", "rte", "--train_rows", "0"], "--train_rows/--train-rows: got '0'"),
    (["--sources", "rte", "--reduction_factor", "100"], "reduction_factor=100"),
    (["--sources", "rte", "--output_dir", __file__], "cannot be made"),
    (["--sources", "rte", "--reduction_factor", "8"], "the source was trained with reduction_factor=4"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_one_line(
    options: list[str], message: str, data: Path, tiny_encoder: str, sources: Path, capsys: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    given = ["--data_dir", str(data), "--model", tiny_encoder, "--target", "cola", "--method", "average"]
    given += ["--output_dir", str(tmp_path), "--source_dir", str(sources), *COMMON]
    assert start(*given, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("how", ["weights", "record", "head"])
def test_a_broken_source_is_one_line(
    how: str, data: Path, tiny_encoder: str, sources: Path, capsys: Any, tmp_path: Path
) -> None:
    shutil.copytree(sources, tmp_path / "sources")
    folder = tmp_path / "sources" / "rte"
    if how == "record":
        (folder / "source.json").write_text("{", encoding="utf-8")
    elif how == "head":
        (folder / "head.safetensors").unlink()
    else:
        file = next(p for p in folder.glob("*.safetensors") if p.name != "head.safetensors")
        file.write_bytes(b"\x00" * 30)
    options = ["--data_dir", str(data), "--model", tiny_encoder, "--sources", "rte", "--target", "cola"]
    options += ["--method", "average", "--output_dir", str(tmp_path / "out")]
    assert start(*options, "--source_dir", str(tmp_path / "sources"), *COMMON) == 2
    captured = capsys.readouterr()
    assert str(folder) in captured.err
    assert captured.err.count("\n") == 1


def test_as_a_command(data: Path, tmp_path: Path, importable: None) -> None:
    options = ["--data_dir", data, "--target", "copa", "--method", "scalearn", "--output_dir", tmp_path]
    done = python(ROOT / "examples" / "transfer.py", *options)
    assert done.returncode == 2
    assert done.stderr == "pal-adapters transfer: error: --sources is needed with --method scalearn\n"
