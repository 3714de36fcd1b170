from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

from pal_adapters.multitask import HeadConfig, TaskHeads

from .conftest import ROOT, load_script

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--task", "topic"]])
def test_the_file_computes_what_the_folder_does(options: list[str], tiny_encoder: str, tmp_path: Path) -> None:
    model = TaskHeads(AutoModel.from_pretrained(tiny_encoder))
    model.add("sentiment", HeadConfig("single_label", 2))
    model.add("topic", HeadConfig("single_label", 7))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "model")
    script = load_script(ROOT / "examples" / "export_onnx.py")
    assert script.main([str(tmp_path / "model"), str(tmp_path / "model.onnx"), *options]) < 1e-4
    assert (tmp_path / "model.onnx").is_file()
