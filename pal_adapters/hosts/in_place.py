"""Adapters that train pretrained weights in place: what may be beside them, and putting the weights back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.in_place import InPlace

from .method import Options
from .unchanged import keep_on_disk, when_settled


def check_beside(adapter_name: str, config: Options, others: Iterable[tuple[str, Any]]) -> None:
    """Raise `UnsupportedError` if a new adapter and one on the model would train or copy the same weights.

    A network runs the whole model, and its copies and frozen blocks have to be the pretrained ones.

    Args:
        adapter_name: the new adapter.
        config: its config.
        others: the names and configs of the adapters beside it; those of the hosts' own methods do not count.
    """
    for name, other in others:
        if not isinstance(other, Options):
            continue
        for one, there in ((config, other), (other, config)):
            in_place = one.train_base and one.base_weights == "in_place"
            if in_place and (there.method.network or (there.train_base and there.base_weights == "all")):
                trains = adapter_name if one is config else name
                raise UnsupportedError(
                    f"adapter {adapter_name!r} cannot be added beside {name!r}: {trains!r} trains pretrained weights "
                    "in place, which the other one needs as they were, or trains too. Use base_weights='copies', or "
                    "a copy of the model for each."
                )


def keep_originals(part: InPlace | None) -> None:
    """Note in a running change that these weights have just begun to train in place; they still have their values."""
    if part is not None and part.originals.known:
        keep_on_disk(part.tensors(), part.originals)
        when_settled(undone=part.originals.remove)


def check_originals(parts: Iterable[InPlace]) -> None:
    """Check that pretrained weights can be put back.

    Raises:
        StorageError: if they cannot be read.
        UnsupportedError: if they are gone, or do not fit any more.
    """
    for part in parts:
        part.require_values()
        part.originals.check(part.tensors())


def put_originals_back(parts: Iterable[InPlace]) -> None:
    """Give weights their pretrained values again, as part of a running change, and freeze them."""
    parts = list(parts)
    check_originals(parts)
    for part in parts:
        keep_on_disk(part.tensors())
    for part in parts:
        part.originals.write_back(part.tensors())
        part.train(False)
        when_settled(part.originals.remove)


def overwrite(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Give weights that train in place the checked values of the same names, as part of a running change."""
    keep_on_disk(own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
