"""The example of two-stage transfer with PEFT as the host."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pal_adapters.multitask import load_toy_task

METHODS = ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp", "fusion", "average", "single")
# Two sources at 2 blocks of width 24, two places a block; `pp` has one set for all places.
COUNTS = {
    "scalearn": 192, "scalearn_uniform": 8, "scalearn_pp": 48, "scalearn_uniform_pp": 2,
    "fusion": 4 * (3 * 24 * 24 + 2 * 24), "average": 0, "single": 4 * (2 * 6 * 24 + 6 + 24),
}  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: str) -> list[str]:
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("data")
    for task, toy, columns in (
        ("rte", "entailment", {"premise": "sentence1", "hypothesis": "sentence2"}),
        ("stsb", "similarity", {}),
    ):
        (root / "glue" / task).mkdir(parents=True)
        for split, rows in load_toy_task(toy, train_size=40, test_size=15)[1].items():
            lines = [json.dumps(row) + "\n" for row in rows.rename_columns(columns).to_list()]
            (root / "glue" / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    common = [
        "--host",
        "peft",
        "--data_dir",
        str(root),
        "--model",
        tiny_encoder,
        "--target",
        "rte",
        "--max_steps",
        "2",
    ]
    return [*common, "--reduction_factor", "4", "--batch_size", "8", "--sources", "rte", "stsb"]


@pytest.fixture(scope="module")
def sources(options: list[str], transfer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("trained")
    given = ["--method", "average", "--output_dir", str(root / "out"), "--source_dir", str(root / "sources")]
    assert transfer.main([*options, *given]) == 0
    return str(root / "sources")


@pytest.mark.parametrize("method", METHODS)
def test_every_method(
    method: str, options: list[str], sources: str, transfer: ModuleType, tmp_path: Path, tiny_encoder: str
) -> None:
    import peft
    from transformers import AutoModel

    before = {p: p.read_bytes() for p in Path(sources).rglob("*") if p.is_file()}
    given = ["--method", method, "--output_dir", str(tmp_path), "--source_dir", sources]
    assert transfer.main([*options, *given]) == 0
    results: dict[str, Any] = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    found = results["target"]
    assert found["parameters"] == {"transfer": COUNTS[method], "head": 50}
    saved = json.loads((tmp_path / "target" / "rte" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["peft_type"].lower().startswith({"fusion": "adapter", "average": "fixed"}.get(method, "")[:5])
    if method in ("fusion", "single"):
        assert found["folded"]["reason"]
    else:
        assert found["folded"]["same_predictions"] is True
        assert found["folded"]["largest_logit_difference"] < 1e-5
        folded = peft.PeftModel.from_pretrained(
            AutoModel.from_pretrained(tiny_encoder), str(tmp_path / "folded" / "rte")
        )
        assert folded.peft_config["default"].hidden_size == 12
    if method != "single":
        assert (tmp_path / "transfer.png").is_file()
        assert found["transfer"]["sources"] == ["rte", "stsb"]
    assert {p: p.read_bytes() for p in Path(sources).rglob("*") if p.is_file()} == before
    # The target stands on its own: it holds copies of its sources.
    target = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), str(tmp_path / "target" / "rte"))
    assert target.active_adapters == ["default"]
