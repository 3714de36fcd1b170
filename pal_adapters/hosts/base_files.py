"""The pretrained weights of several adapters that are saved together: stored once, and linked into each folder.

An adapter with `train_base` is saved with the pretrained weights. If one call saves several of them, or if these
weights are too large for one file, they go into files `base-<SHA-256 of the file>.safetensors`, which are hard links
in the folders of all these adapters, or copies where the file system has no links. Instead of the weights, the
adapter's own file has the hashes, as bytes of shape `[files, 32]`. Each folder is complete: it can be moved, copied
or uploaded alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pal_adapters.errors import StorageError

from .shards import SHARD_SIZE, separate, shards

REFERENCE = "base_sha256"
"""Name of the tensor that stands for the pretrained weights in an adapter's file."""

_NAME = re.compile(r"base-[0-9a-f]{64}\.safetensors")
_CHUNK = 1 << 20


FolderOf = Callable[[str], Path]
"""The folder in which an adapter is saved, by its name."""


class BaseFiles:
    """The base files that one call writes.

    Args:
        folder_of: where the call saves each adapter.
        adapters: how many adapters with pretrained weights it saves.
    """

    def __init__(self, folder_of: FolderOf, adapters: int) -> None:
        self._folder_of = folder_of
        self._adapters = adapters
        self._written: dict[tuple[Any, ...], list[Path]] = {}
        self._kept: dict[Path, set[str]] = {}

    def needed(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether pretrained weights get files of their own."""
        return bool(tensors) and (self._adapters > 1 or sum(t.nbytes for t in tensors.values()) > SHARD_SIZE)

    def put(self, tensors: Mapping[str, Tensor], adapter_name: str) -> Tensor:
        """Put pretrained weights, by their names in the adapter's file, into the folder of an adapter.

        Returns:
            What the adapter's file has under the name `REFERENCE`.
        """
        folder = self._folder_of(adapter_name)
        folder.mkdir(parents=True, exist_ok=True)
        key = tuple(
            (name, t.data_ptr(), t.storage_offset(), t.shape, t.dtype, t.device) for name, t in tensors.items()
        )
        if key not in self._written:
            self._written[key] = [_write(shard, folder) for shard in shards(tensors, SHARD_SIZE)]
        files = self._written[key]
        names = [file.name for file in files]
        for file in files:
            _link(file, folder / file.name)
        self._kept[folder] = set(names)
        return torch.tensor([list(bytes.fromhex(digest_of(name))) for name in names], dtype=torch.uint8)

    def names_in(self, folder: Path) -> set[str]:
        """The base files of the adapter in a folder."""
        return self._kept.get(folder, set())


_SAVING: ContextVar[BaseFiles | None] = ContextVar("pal_adapters_base_files", default=None)


@contextmanager
def stored_once(folder_of: FolderOf, adapters: int) -> Iterator[None]:
    """While the body saves adapters, their pretrained weights are stored once; may be nested, the outermost counts.

    Args:
        folder_of: where it saves each adapter.
        adapters: how many of them come with pretrained weights.
    """
    if _SAVING.get() is not None:
        yield
        return
    token = _SAVING.set(BaseFiles(folder_of, adapters))
    try:
        yield
    finally:
        _SAVING.reset(token)


def in_adapter_file(base: Mapping[str, Tensor], adapter_name: str, *, prefix: str = "") -> dict[str, Tensor]:
    """What the file of an adapter holds for the pretrained weights: themselves, or the hashes of the base files.

    Args:
        base: the weights, by their names in the file.
        adapter_name: the adapter.
        prefix: prefix of the names.
    """
    files = _SAVING.get()
    if files is None or not files.needed(base):
        return dict(base)
    return {prefix + REFERENCE: files.put(base, adapter_name)}


def remove_unused(folder: Path) -> None:
    """Remove the base files that earlier saves left in the folder of an adapter, once the adapter is saved."""
    files = _SAVING.get()
    used = set() if files is None else files.names_in(folder)
    for path in (*base_files(folder), *folder.glob(_part("*"))):  # a process that is killed may leave a part
        if path.name not in used:
            path.unlink(missing_ok=True)


Find = Callable[[str], Path]
"""Finds a file of the adapter that is being loaded by its name."""

_LOADING: ContextVar[Find | None] = ContextVar("pal_adapters_find_base_file", default=None)


@contextmanager
def found_by(find: Find) -> Iterator[None]:
    """While the body loads an adapter, `find` says where its base files are."""
    token = _LOADING.set(find)
    try:
        yield
    finally:
        _LOADING.reset(token)


def with_base(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of an adapter's file, with those of the base files to which it refers.

    Raises:
        StorageError: if a base file is missing or damaged, or the reference is.
    """
    keys = [key for key in tensors if key == REFERENCE or str(key).endswith(f".{REFERENCE}")]
    if not keys:
        return tensors
    find = _LOADING.get()
    names = _names(tensors[keys[0]])
    if find is None or len(keys) > 1:
        raise StorageError(
            f"the pretrained weights of this adapter are in {names[0]}, beside its file, which tensors alone do not "
            "find: load its folder, with load_adapter or from_pretrained."
        )
    own = {key: value for key, value in tensors.items() if key not in keys}
    device = next((value.device for value in own.values() if isinstance(value, Tensor)), torch.device("cpu"))
    base: dict[str, Tensor] = {}
    for name in names:
        base.update(_read(find(name), device))
    return {**base, **own}


def _names(reference: Any) -> list[str]:
    if (
        not isinstance(reference, Tensor)
        or reference.dtype != torch.uint8
        or reference.dim() != 2
        or reference.shape[1] != hashlib.sha256().digest_size
        or not len(reference)
    ):
        raise StorageError(f"{REFERENCE} in the adapter's file is damaged: it needs bytes of shape [files, 32].")
    return [file_name(bytes(row).hex()) for row in reference.tolist()]


def _read(path: Path, device: torch.device) -> dict[str, Tensor]:
    if not path.is_file():
        raise StorageError(
            f"{path} is missing: it has the pretrained weights of the adapter beside it. Copy the whole folder again."
        )
    if file_name(sha256(path)) != path.name:
        raise StorageError(f"{path} is damaged: its content has another hash than its name. Copy the file again.")
    return load_file(path, device=str(device))


# Files


def file_name(digest: str) -> str:
    """The name of a base file with a content of this SHA-256, in hexadecimal digits."""
    return f"base-{digest}.safetensors"


def digest_of(name: str) -> str:
    """The hash in the name of a base file."""
    return name.removeprefix("base-").removesuffix(".safetensors")


def base_files(folder: Path) -> list[Path]:
    """The base files in a folder."""
    return sorted(path for path in folder.glob("base-*.safetensors") if _NAME.fullmatch(path.name))


def copier() -> Callable[[str, str], None]:
    """A function that copies files as `shutil.copy` does, but a base file of several folders only once."""
    copied: dict[str, Path] = {}

    def copy(source: str, target: str) -> None:
        name = Path(source).name
        if name in copied:
            link_or_copy(copied[name], Path(target))
            return
        shutil.copy(source, target)
        if _NAME.fullmatch(name):
            copied[name] = Path(target)

    return copy


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _write(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    part = folder / _part(uuid.uuid4().hex)
    try:
        save_file(separate(tensors), part, metadata={"format": "pt"})
        path = folder / file_name(sha256(part))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _link(source: Path, target: Path) -> None:
    part = target.parent / _part(uuid.uuid4().hex)
    try:
        link_or_copy(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)  # which stays if `target` was the same file before


def _part(number: str) -> str:
    """The name of a base file while it is being written."""
    return f".base-{number}.writing"
