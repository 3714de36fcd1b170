from __future__ import annotations

from pathlib import Path

import pytest

from tests.multitask.tiny_encoder import save_tiny_encoder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny_encoder"))


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes find the package, installed or not."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
