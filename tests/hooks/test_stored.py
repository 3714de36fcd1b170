"""Tensors in a temporary file."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pal_adapters.errors import StorageError, UnsupportedError
from pal_adapters.hooks.stored import Stored
from tests.processes import python


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def tensors() -> dict[str, Tensor]:
    big = torch.arange(24.0).reshape(4, 6)
    return {
        "part": big[:2],
        "other part": big[2:],
        "turned": big.t(),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "one": torch.nn.Parameter(torch.tensor(3.0)),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_come_back(dtype: torch.dtype) -> None:
    stored = Stored(tensors())
    changed = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in tensors().items()}
    stored.check(changed)
    stored.write_back(changed)
    assert all(torch.equal(changed[name], value.to(dtype)) for name, value in tensors().items())
    assert all(torch.equal(stored.read(name), value) for name, value in tensors().items())


def test_the_file_goes_with_the_object_and_once(room: Path) -> None:
    stored = Stored(tensors())
    assert len(list(room.iterdir())) == 1
    del stored
    gc.collect()
    assert list(room.iterdir()) == []
    stored = Stored(tensors())
    stored.remove()
    stored.remove()
    assert list(room.iterdir()) == []
    with pytest.raises(StorageError, match="cannot be read"):
        stored.check(tensors())


def test_only_the_owner_can_read_it(room: Path) -> None:
    stored = Stored(tensors())
    assert stored.known
    assert next(room.iterdir()).stat().st_mode & 0o077 == 0


def test_a_deep_copy_has_a_file_of_its_own(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: str) -> None:
        raise OSError("no links here")

    for links in (True, False):
        stored = Stored(tensors())
        if not links:
            monkeypatch.setattr(os, "link", refuse)
        other, again = copy.deepcopy([stored, stored])
        assert other is again
        assert len(list(room.iterdir())) == 2
        stored.remove()
        assert torch.equal(other.read("turned"), tensors()["turned"])
        other.remove()
        assert list(room.iterdir()) == []
    gone = copy.deepcopy(other)
    with pytest.raises(UnsupportedError, match="their temporary file has been removed"):
        gone.check(tensors())


def test_a_pickled_one_has_none(room: Path) -> None:
    stored = Stored(tensors())
    other = pickle.loads(pickle.dumps(stored))
    assert not other.known
    with pytest.raises(UnsupportedError, match="has been pickled since"):
        other.check(tensors())
    other.remove()
    assert len(list(room.iterdir())) == 1
    assert copy.deepcopy(other).known is False


def test_what_does_not_fit_any_more(room: Path) -> None:
    stored = Stored(tensors())
    with pytest.raises(UnsupportedError, match=r"half has shape \[3\] now and had \[2\]"):
        stored.check({"half": torch.zeros(3)})
    path = next(room.iterdir())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StorageError, match="cannot be read"):
        stored.check(tensors())


def test_a_folder_without_room_is_named(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pal_adapters.hooks.stored.save_file", full)
        with pytest.raises(StorageError, match=r"^200 bytes of .*no space left on device.*set TMPDIR"):
            Stored(tensors())
    assert list(room.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(room / "missing"))
    with pytest.raises(StorageError, match="set TMPDIR to a folder that exists"):
        Stored(tensors())


def test_the_file_stays_while_its_process_lives_and_not_longer(room: Path) -> None:
    code = """
import os, sys, tempfile, torch
tempfile.tempdir = sys.argv[1]
from pal_adapters.hooks.stored import Stored
stored = Stored({"a": torch.ones(3)})
child = os.fork()
if child == 0:
    sys.exit(0)  # runs what is due at the end of a process
os.waitpid(child, 0)
print(sum(name.startswith("pal_adapters-") for name in os.listdir(sys.argv[1])), stored.read("a").tolist())
"""
    result = python("-c", code, room)
    assert result.stdout.strip() == "1 [1.0, 1.0, 1.0]", result.stderr
    assert list(room.glob("pal_adapters-*")) == []
