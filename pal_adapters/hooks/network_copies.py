"""Which pretrained weights a network trains as copies, and the values that the copies start with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import nn

from pal_adapters.blocks.placement import require_at_hand
from pal_adapters.blocks.sites import Block, find_blocks

from .network_unit import NetworkUnit
from .weight_copies import Slots, block_slots, fill, outer_slots


class CopyOptions(Protocol):
    """The options of a network that decide what it copies."""

    train_base: bool
    freeze_layers: Collection[int]
    freeze_embeddings: bool
    sites: Mapping[str, str] | None

    def start_top_block(self, copies: nn.ParameterDict, slots: Slots, generator: torch.Generator | None) -> None:
        """Change the initial values of the last block's copies, or leave them pretrained."""


def give_copies(
    unit: NetworkUnit,
    block: Block,
    model: nn.Module,
    options: CopyOptions,
    *,
    added: set[int],
    headless: nn.Module | None = None,
    left_out: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> None:
    """Give a new unit its copies of pretrained weights; the last block's unit also holds those outside the blocks.

    Args:
        unit: the unit of `block`.
        block: the block.
        model: the model that holds it.
        options: what is copied.
        added: parameters of the model that are not pretrained, by id.
        headless: the model without its head, where it differs from `model`.
        left_out: modules that are trained separately.
        generator: used if the last block does not start from its pretrained weights.

    Raises:
        UnsupportedError: if accelerate offloads pretrained weights.
    """
    require_at_hand(model, "a network reads and copies")
    if not options.train_base:
        return
    inner: Slots = {} if block.index in options.freeze_layers else block_slots(block, added)
    fill(unit.base, inner)
    outer: Slots = {}
    if block.last:
        options.start_top_block(unit.base, inner, generator)
        blocks = find_blocks(model, options.sites)
        for embeddings in (False,) if options.freeze_embeddings else (False, True):
            outer |= outer_slots(headless or model, blocks, added, left_out=left_out, embeddings=embeddings)
        fill(unit.outer, outer)
    unit.slots = (inner, outer)
