"""Attention masks in every form that Hugging Face blocks receive, brought to one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedError


def _dense_block_mask(mask: object, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(mask, BlockMask):
        raise UnsupportedError(
            f"attention_mask of type {type(mask).__name__} is not supported: pass None, a tensor with 2 to 4 "
            "dimensions or a flex-attention BlockMask."
        )
    batch = mask.shape[0] if len(mask.shape) > 2 else 1
    return create_mask(mask.mask_mod, batch, 1, q_len, kv_len, device=str(device))


def _causal(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Lower-right aligned `[1, 1, q, k]`: the last query sees every key."""
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)[None, None]


def normalise_mask(
    mask: object, *, q_len: int, kv_len: int, causal: bool, device: torch.device
) -> tuple[Tensor | None, bool]:
    """Bring the mask that a block got to what `functional.attend` takes.

    Args:
        mask: None; `[b, k]` with non-zero for tokens; `[b, q, k]` or `[b, 1, q, k]`, boolean or integer (non-zero is
            kept) or floating point (added to the scores); or a flex-attention `BlockMask`.
        q_len, kv_len: lengths of this call.
        causal: whether the host's self-attention hides later positions.

    Returns:
        `(mask, is_causal)`: the mask, boolean (True is kept) or additive, broadcastable to `[b, h, q, k]`; and whether
        causality still has to be applied, which is only so without a mask.

    Raises:
        UnsupportedError: for another type or shape.
    """
    if mask is None:
        if causal and q_len > 1 and q_len != kv_len:
            return _causal(q_len, kv_len, device), False
        return None, causal and q_len > 1
    if not isinstance(mask, Tensor):
        return _dense_block_mask(mask, q_len, kv_len, device), False
    if mask.dim() == 2:
        mask = (mask != 0)[:, None, None, :]
    elif mask.dim() == 3:
        mask = mask[:, None]
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise UnsupportedError(
            f"attention_mask of shape {list(mask.shape)} is not supported: use [batch, keys], [batch, queries, keys] or "
            "[batch, 1, queries, keys]; a bias that differs from head to head has no meaning for the heads of a task "
            "module."
        )
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        mask = mask != 0
    if mask.shape[-1] > kv_len:  # static caches: the mask covers slots that are not filled yet
        mask = mask[..., :kv_len]
    if mask.shape[-2] > q_len:
        mask = mask[..., -q_len:, :]
    if causal and q_len > 1 and mask.shape[-2] == 1:
        keep = _causal(q_len, kv_len, device)
        mask = mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, torch.finfo(mask.dtype).min)
    return mask, False
