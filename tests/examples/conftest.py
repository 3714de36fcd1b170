from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.multitask.tiny_encoder import save_tiny_encoder

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))  # a script finds the files beside it


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny_encoder"))


@pytest.fixture(scope="session")
def quickstart() -> ModuleType:
    return load_script(ROOT / "examples" / "quickstart.py")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes find the package, installed or not."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def glue() -> ModuleType:
    return load_script(ROOT / "examples" / "glue.py")


@pytest.fixture(scope="session")
def sampling_picture() -> ModuleType:
    return load_script(ROOT / "examples" / "sampling_picture.py")
