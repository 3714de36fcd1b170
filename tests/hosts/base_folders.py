"""Folders of adapters whose pretrained weights are stored once: what is in them, and ways to damage them."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Iterable

import torch
from safetensors.torch import load_file, save_file

from pal_adapters.hosts.base_files import REFERENCE


def bases(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("base-*"))


def check_stored_once(folders: Iterable[pathlib.Path], *, linked: bool = True, files: int = 1) -> None:
    """Each folder has the same base files, with their hashes as names, and they are stored once if `linked`."""
    folders = list(folders)
    for folder in folders:
        assert [p.name for p in bases(folder)] == [p.name for p in bases(folders[0])]
        assert len(bases(folder)) == files
        assert not list(folder.glob(".*"))
    for path in bases(folders[0]):
        assert path.name == f"base-{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors"
        inodes = {(folder / path.name).stat().st_ino for folder in folders}
        assert len(inodes) == (1 if linked else len(folders))


def key_of(tensors: dict[str, torch.Tensor]) -> str:
    (key,) = [key for key in tensors if key.endswith(REFERENCE)]
    return key


def in_one_file(folder: pathlib.Path, name: str) -> None:
    """Make a folder one that was saved alone: its own file has everything."""
    tensors = load_file(folder / name)
    del tensors[key_of(tensors)]
    for path in bases(folder):
        tensors |= load_file(path)
        path.unlink()
    save_file(tensors, folder / name, metadata={"format": "pt"})


def _missing(folder: pathlib.Path, name: str) -> None:
    bases(folder)[0].unlink()


def _truncated(folder: pathlib.Path, name: str) -> None:
    path = bases(folder)[0]
    content = path.read_bytes()
    path.unlink()  # other folders have links to it
    path.write_bytes(content[: len(content) // 2])


def _flipped(folder: pathlib.Path, name: str) -> None:
    path = bases(folder)[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.unlink()
    path.write_bytes(content)


def _another(folder: pathlib.Path, name: str) -> None:
    path = bases(folder)[0]
    tensors = {key: value + 1 for key, value in load_file(path).items()}
    path.unlink()
    save_file(tensors, path)


def _reference(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pathlib.Path, str], None]:
    def damage(folder: pathlib.Path, name: str) -> None:
        tensors = load_file(folder / name)
        key = key_of(tensors)
        save_file({**tensors, key: change(tensors[key]).contiguous()}, folder / name)

    return damage


DAMAGE: dict[str, tuple[Callable[[pathlib.Path, str], None], str]] = {
    "missing": (_missing, r"base-[0-9a-f]{64}\.safetensors is missing"),
    "truncated": (_truncated, r"base-[0-9a-f]{64}\.safetensors is damaged"),
    "one bit": (_flipped, r"base-[0-9a-f]{64}\.safetensors is damaged"),
    "another content": (_another, r"base-[0-9a-f]{64}\.safetensors is damaged"),
    "another hash": (_reference(lambda t: t ^ 1), r"base-[0-9a-f]{64}\.safetensors is missing"),
    "a short hash": (_reference(lambda t: t[:, :16]), "base_sha256 in the adapter's file is damaged"),
    "no hash": (_reference(lambda t: t[:0]), "base_sha256 in the adapter's file is damaged"),
    "floats": (_reference(lambda t: t.float()), "base_sha256 in the adapter's file is damaged"),
}
"""Each damages a folder with an adapter's file of the given name; with the error it causes."""
