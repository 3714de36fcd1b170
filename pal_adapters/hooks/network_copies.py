"""Which pretrained weights a network trains, as copies or in place, and the values that they start with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pal_adapters.blocks.placement import require_at_hand
from pal_adapters.blocks.sites import Block, find_blocks
from pal_adapters.nn.unit import key_of

from .in_place import InPlace
from .network_unit import NetworkUnit
from .weight_copies import Slots, block_slots, fill, outer_slots


class TrainedWeights(Protocol):
    """The options of a network that decide which pretrained weights it trains."""

    train_base: bool
    base_weights: Any
    freeze_layers: Collection[int]
    freeze_embeddings: bool
    sites: Mapping[str, str] | None

    def start_top_block(
        self, weights: Iterable[tuple[Tensor, nn.Module, str]], generator: torch.Generator | None
    ) -> None:
        """Change the initial values of the last block's weights, each with its place, or leave them pretrained."""


def give_weights(
    unit: NetworkUnit,
    block: Block,
    model: nn.Module,
    options: TrainedWeights,
    *,
    added: set[int],
    headless: nn.Module | None = None,
    left_out: Collection[str] = (),
    lost: str = "",
) -> None:
    """Give a new unit the pretrained weights that it trains; the last block's also gets those outside the blocks.

    Args:
        unit: the unit of `block`.
        block: the block.
        model: the model that holds it.
        options: which weights train, and how.
        added: parameters of the model that are not pretrained, by id.
        headless: the model without its head, where it differs from `model`.
        left_out: modules that are trained separately.
        lost: why the model does not have its pretrained weights now, a clause; empty if it has.

    Raises:
        UnsupportedError: if accelerate offloads pretrained weights, or weights to be trained in place cannot be.
        StorageError: if the originals of weights to be trained in place cannot be written to a file.
    """
    require_at_hand(model, "a network reads and copies")
    if not options.train_base:
        return
    inner: Slots = {} if block.index in options.freeze_layers else block_slots(block, added)
    outer: Slots = {}
    if block.last:
        blocks = find_blocks(model, options.sites)
        for embeddings in (False,) if options.freeze_embeddings else (False, True):
            outer |= outer_slots(headless or model, blocks, added, left_out=left_out, embeddings=embeddings)
    if options.base_weights == "in_place":
        unit.in_place = InPlace(inner, outer, lost) if inner or outer else None
        return
    fill(unit.base, inner)
    fill(unit.outer, outer)
    unit.slots = (inner, outer)


def start_weights(unit: NetworkUnit, block: Block, options: TrainedWeights, generator: torch.Generator | None) -> None:
    """Give the weights of the last block, which `unit` trains, the values that they start with."""
    if not block.last or not options.train_base:
        return
    weights: list[tuple[Any, nn.Module, str]]
    if unit.in_place is None:
        weights = [(unit.base[key_of(name)], *places[0]) for name, places in unit.slots[0].items()]
    else:
        found = unit.in_place.tensors()
        weights = [(found[key], *places[0]) for key, places in unit.in_place.places() if key.startswith("base.")]
    options.start_top_block(weights, generator)
