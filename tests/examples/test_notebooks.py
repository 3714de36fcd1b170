"""The notebooks: their scripts run, and they are what the scripts make."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path

import jupytext
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(script: Path, tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adapters")
    monkeypatch.setenv("MODEL", tiny_encoder)
    monkeypatch.setenv("STEPS", "15")
    make = tempfile.mkdtemp
    monkeypatch.setattr(
        "tempfile.mkdtemp", lambda suffix=None, prefix=None, dir=None: make(suffix, prefix, dir or tmp_path)
    )
    left = runpy.run_path(str(script))
    assert left["trainer"].state.global_step > 0
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_is_what_its_script_makes(script: Path) -> None:
    """If not: `jupytext --to ipynb examples/notebooks/*.py`."""
    made, found = jupytext.read(script), jupytext.read(script.with_suffix(".ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (made, found)]
    assert cells[0] == cells[1]
    assert len(cells[0]) > 5
