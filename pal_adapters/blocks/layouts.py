"""Hidden states in the layout of a model, and in the one that task modules read. Knows no method and neither host."""

from __future__ import annotations

import torch
from torch import Tensor


def to_tokens(value: Tensor, layout: str) -> Tensor:
    """Hidden states as `[b, n, d]`, an image row by row.

    Args:
        value: in the layout of the block.
        layout: `BlockSites.layout`.
    """
    if layout == "tokens_first":
        return value.transpose(0, 1)
    if layout == "channels_first":
        value = value.movedim(1, -1).contiguous()
    return value.flatten(1, 2) if value.dim() == 4 and layout in ("grid", "channels_first") else value


def from_tokens(value: Tensor, like: Tensor, layout: str) -> Tensor:
    """The inverse of `to_tokens`.

    Args:
        value: `[b, n, d]`.
        like: a tensor of the result's shape.
        layout: `BlockSites.layout`.
    """
    if layout == "tokens_first":
        return value.transpose(0, 1)
    if layout == "channels_first":
        value = value.transpose(1, 2).reshape(like.shape)
        # Convolutions and norms may sum in another order for other strides.
        return torch.empty_like(like, dtype=value.dtype).copy_(value)
    return value.reshape(like.shape) if layout == "grid" else value
