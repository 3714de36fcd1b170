"""Files of tensors and JSON: written whole or not at all, and checked before they are used."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pal_adapters.errors import PalAdaptersError, StorageError
from pal_adapters.files import replacing
from pal_adapters.hosts.base_files import base_files
from pal_adapters.hosts.shards import SHARD_SIZE, separate, shards
from pal_adapters.hosts.tensors import fault_of
from pal_adapters.hosts.unchanged import keep_values

from .parts import part_of


def cause_of(error: BaseException) -> str:
    """An error's message on one line and printable, as part of another one; those of other packages are cut short."""
    text = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
    return (text if isinstance(error, PalAdaptersError) else text[:200]) or type(error).__name__


@contextmanager
def staged(directory: Path, last: str, stems: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write to, whose files replace those of `directory` once all of them are written.

    If the body raises, `directory` is left as it was. Files of `directory` that are not written again stay.

    Args:
        directory: The folder; it is created.
        last: The file whose presence marks the folder as complete. It is removed first and moved last, so a
            process that is killed in between leaves a folder that is recognisably incomplete.
        stems: Stems of what `write_tensors` may have left in `directory` earlier and must not stay, as paths in it.
    """
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
    try:
        yield stage
        created = []
        (directory / last).unlink(missing_ok=True)
        for stem in stems:
            remove_tensors(directory / Path(stem).parent, Path(stem).name)
        written = sorted((path for path in stage.rglob("*") if path.is_file()), key=lambda path: path.name == last)
        for folder in {path.parent for path in written}:
            for path in base_files(directory / folder.relative_to(stage)):
                if not (folder / path.name).exists():
                    path.unlink()  # no adapter refers to it any more
        for path in written:
            target = directory / path.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):
            for path in created:
                path.rmdir()


def inside(directory: Path, name: str) -> Path:
    """The path of a file or folder in `directory`.

    Raises:
        StorageError: If it is a link that leads nowhere or out of the folder, or a device.
    """
    path, root = directory / name, directory.resolve()
    if os.path.lexists(path) and not path.is_file() and not path.is_dir():
        raise StorageError(f"{path} is neither a file nor a folder: get or write it again.")
    target = path.resolve()
    homes = [root]
    if root.parent.name == "snapshots":  # the cache of the Hub links from a snapshot to the files beside it
        homes.append(root.parents[1] / "blobs")
    if not any(target == home or home in target.parents for home in homes):
        raise StorageError(f"{path} leads out of its folder, to {target}: copy the file into the folder.")
    return path


def write_tensors(tensors: Mapping[str, Tensor], directory: Path, stem: str) -> None:
    """Writes `<stem>.safetensors`, or several shards and an index where one file would be too large."""
    directory.mkdir(parents=True, exist_ok=True)
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]  # tied weights are written once
        else:
            first[id(tensor)] = name
            plain[name] = tensor
    parts = list(shards(plain, SHARD_SIZE))
    names = {}
    for number, part in enumerate(parts, start=1):
        count = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        file = f"{stem}{count}.safetensors"
        names.update(dict.fromkeys(part, file))
        same = {again: name for again, name in tied.items() if name in part}
        save_file(separate(part), directory / file, metadata={"format": "pt", **same})
    if len(parts) > 1:
        size = sum(tensor.nbytes for tensor in plain.values())
        index = {"metadata": {"total_size": size}, "weight_map": names}
        write_readable_json(index, directory / f"{stem}.safetensors.index.json")


def remove_tensors(directory: Path, stem: str) -> None:
    """Removes what `write_tensors` wrote."""
    pattern = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for path in directory.glob(f"{stem}*"):
        if pattern.fullmatch(path.name):
            path.unlink()


def tensor_files(directory: Path, stem: str) -> list[Path]:
    """The file that `write_tensors` wrote, or its shards.

    Raises:
        StorageError: If there is none, or the index names a file that cannot be a shard.
    """
    path = inside(directory, f"{stem}.safetensors")
    index = inside(directory, f"{stem}.safetensors.index.json")
    if path.is_file() or not index.is_file():
        return [path]
    shards = read_json(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else [None]
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise StorageError(f"{index} is damaged: weight_map does not map names of tensors to files.")
    return [inside(directory, name) for name in sorted(map(str, set(names)))]


def read_tensors(directory: Path, stem: str) -> dict[str, Tensor]:
    """The tensors that `write_tensors` wrote.

    Raises:
        StorageError: If a file is missing or damaged, or a value is not finite.
    """
    found: dict[str, Tensor] = {}
    for path in tensor_files(directory, stem):
        found |= read_tensor_file(path)
    return found


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, checked."""
    if not path.is_file():
        raise StorageError(f"{path} is not there.")
    try:
        tensors = load_file(path)  # huggingface_hub's reader rejects files without metadata, which are valid
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        bad = [name for name, tensor in floats.items() if not torch.isfinite(tensor.float()).all()]
    except Exception as error:  # readers of damaged files raise errors without a common base
        raise StorageError(f"{path} is damaged ({cause_of(error)}): get or write it again.") from error
    if bad:
        raise StorageError(f"{path} is damaged: {bad[0]} has values that are not finite.")
    return tensors


def check_fit(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: Path) -> None:
    """Raises `StorageError` unless the stored values can replace the tensors: by name, shape, dtype and value."""
    tied = {id(tensors[name]) for name in stored if name in tensors}
    missing = sorted(name for name in set(tensors) - set(stored) if id(tensors[name]) not in tied)
    extra = sorted(set(stored) - set(tensors))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model lacks"
        raise StorageError(f"{where} {what} ({len(missing)} missing, {len(extra)} too many): it is of another model.")
    for name, value in stored.items():
        if fault := fault_of(name, value, tensors[name]):
            raise StorageError(f"{where}: {fault}.")


def copy_into(tensors: Mapping[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Moves stored values, which `check_fit` has accepted, into tensors, which stay the same objects.

    A running `all_or_nothing` keeps the former values. So that memory never holds a tensor three times, `stored` is
    emptied along the way.
    """
    with torch.no_grad():
        for name in list(stored):
            keep_values([tensors[name]])
            tensors[name].copy_(part_of(stored.pop(name), tensors[name]))


def write_readable_json(value: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON file that people can read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        StorageError: If the file is missing, damaged, holds something else, or gives a key of an object twice.
    """
    if not path.is_file():
        raise StorageError(f"{path} is not there.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_keys_once)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair can be neither printed nor sent
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({cause_of(error)}): get or write it again.") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} is damaged: it holds a {type(value).__name__}, not an object.")
    return value


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        found[key] = value
    return found


def replace_text(path: Path, text: str) -> None:
    """Writes a text file in one step, see `replacing`."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")
