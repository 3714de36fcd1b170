"""Tensors that are kept in a temporary file instead of memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pal_adapters.errors import StorageError, UnsupportedError


class Stored:
    """The values of some tensors, in a file in the folder for temporary files (`TMPDIR`).

    The file goes with this object, with the process, or by `remove`. A deep copy of the object has a file of its own,
    a hard link where the file system has links. A pickled one has none: `check` says so.

    Args:
        tensors: the tensors by name.

    Raises:
        StorageError: if the file cannot be written.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._path: str | None = None
        self._why = ""
        self._claim(_new_path())
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, self._file())
        except (OSError, SafetensorError) as error:  # a full disk is either
            self.remove()
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise StorageError(
                f"{size:,} bytes of weights cannot be written to {tempfile.gettempdir()} ({error}): set TMPDIR to a "
                "folder with enough room."
            ) from error

    def _claim(self, path: str) -> None:
        self._path = path
        self._finalizer: Any = weakref.finalize(self, _unlink, path, os.getpid())

    def _file(self) -> str:
        if self._path is None:
            raise UnsupportedError(
                f"the pretrained values of weights that are trained in place are not known: {self._why}. Load the "
                "pretrained model instead."
            )
        return self._path

    @classmethod
    def lost(cls, why: str) -> Stored:
        """Values that are not known, with the reason, a clause without a full stop."""
        made = cls.__new__(cls)
        made._path, made._why = None, why
        return made

    @property
    def known(self) -> bool:
        """Whether there are values."""
        return self._path is not None

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that the values can be written back to these tensors.

        Raises:
            StorageError: if the file is missing or damaged.
            UnsupportedError: if there is none, or a tensor has another shape than before.
        """
        path = self._file()
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{path} with the pretrained values of weights that were trained in place cannot be read ({error}): "
                "load the pretrained model again."
            ) from error
        for name, tensor in tensors.items():
            if shapes.get(name) != list(tensor.shape):
                raise UnsupportedError(
                    f"{name} has shape {list(tensor.shape)} now and had {shapes.get(name)} when it began to train in "
                    "place, so its pretrained values cannot be put back: load the pretrained model again."
                )

    def read(self, name: str) -> Tensor:
        """One of the values, on the CPU."""
        with safe_open(self._file(), framework="pt") as file:
            return file.get_tensor(name)

    def write_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Give tensors of these names their values again, in the dtype and on the device that they have now."""
        with torch.no_grad(), safe_open(self._file(), framework="pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))

    def remove(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._finalizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        made = memo[id(self)] = self.lost(self._why or "their temporary file has been removed")
        if self._path is not None and os.path.exists(self._path):
            made._claim(_new_path())
            link = f"{made._file()}.link"
            try:
                os.link(self._path, link)
                os.replace(link, made._file())
            except OSError:  # into the new file, which only its owner can read
                shutil.copyfile(self._path, made._file())
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, ()


def _unpickled() -> Stored:
    return Stored.lost(
        "they are in a temporary file of the process that added the adapter, and this model has been pickled since"
    )


def _new_path() -> str:
    try:
        handle, path = tempfile.mkstemp(prefix="pal_adapters-", suffix=".safetensors")
    except OSError as error:
        raise StorageError(f"no temporary file can be made ({error}): set TMPDIR to a folder that exists.") from error
    os.close(handle)
    return path


def _unlink(path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has the object too, but not its file
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
