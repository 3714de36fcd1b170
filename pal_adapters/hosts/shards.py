"""Tensors split over files, in the form in which safetensors writes them without copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

SHARD_SIZE = 5_000_000_000
"""Bytes in one file, at most, unless a single tensor is larger. Saving from a GPU needs as much memory on the CPU."""


def shards(tensors: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in their order, in groups of at most `size` bytes; a single empty group if there are none."""
    shard: dict[str, Tensor] = {}
    total = 0
    for name, tensor in tensors.items():
        if shard and total + tensor.nbytes > size:
            yield shard
            shard, total = {}, 0
        shard[name] = tensor
        total += tensor.nbytes
    yield shard


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without gradients, contiguous, and without memory in common; only those that are not are copied."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    end: dict[object, int] = {}
    for name, tensor in sorted(plain.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if tensor.nbytes and start < end.get(tensor.device, 0):
            plain[name] = tensor.clone()
        end[tensor.device] = max(end.get(tensor.device, 0), start + tensor.nbytes)
    return plain
