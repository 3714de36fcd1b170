"""Attention masks in every form that Hugging Face blocks receive, converted to one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from pal_adapters.errors import UnsupportedError

# Lowering a score by this much hides a key: additive masks hold -10000, -inf or the minimum of a dtype.
_HIDDEN = -1000.0


def _dense_block_mask(mask: object, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    if not isinstance(mask, BlockMask):
        raise UnsupportedError(
            f"attention_mask of type {type(mask).__name__} is not supported: pass None, a tensor with 2 to 4 "
            "dimensions or a flex-attention BlockMask."
        )
    batch = mask.shape[0] if len(mask.shape) > 2 else 1
    return create_mask(mask.mask_mod, batch, 1, q_len, kv_len, device=str(device))


def _causal(q_len: int, kv_len: int, window: int | None, device: torch.device) -> Tensor:
    """Lower-right aligned `[1, 1, q, k]`: the last query sees every key, or the last `window` keys."""
    keep = torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)
    return (keep if window is None else keep.triu(kv_len - q_len - window + 1))[None, None]


def _key_mask(mask: Tensor) -> Tensor:
    """`[b, k]` -> `[b, 1, 1, k]`, True for tokens."""
    keep = mask != 0
    if mask.is_floating_point():
        # Ones for tokens, or scores to add with negative ones for padding; told apart without waiting for the device.
        keep = torch.where((mask < 0).any(), mask >= 0, keep)
    return keep[:, None, None, :]


def _shared_by_heads(mask: Tensor, q_len: int) -> Tensor:
    """`[b, h, q, k]` -> `[b, 1, q, k]`: what a mask hides from all heads, without what it adds for single ones."""
    if not mask.is_floating_point() or mask.shape[-2] != q_len:
        raise UnsupportedError(
            f"attention_mask of shape {list(mask.shape)} is not supported: use [batch, keys], [batch, queries, "
            f"keys] or "
            "[batch, 1, queries, keys]; a mask that differs from head to head has no meaning for the heads of a task "
            "module."
        )
    # Position biases (ALiBi) come in this form.
    return (mask > torch.finfo(mask.dtype).min / 2).any(dim=1, keepdim=True)


def normalise_mask(
    mask: object,
    *,
    q_len: int,
    kv_len: int,
    causal: bool,
    device: torch.device,
    window: int | None = None,
    triangle: bool = False,
) -> tuple[Tensor | None, bool]:
    """Convert a block's mask to what `functional.attend` takes.

    Args:
        mask: None; `[b, k]` with non-zero for tokens; `[b, q, k]` or `[b, 1, q, k]`, boolean or integer (non-zero is
            kept) or floating point (added to the scores); or a flex-attention `BlockMask`.
        q_len, kv_len: lengths of this call.
        causal: whether the host's self-attention hides later positions.
        window: the maximum number of positions that a causal self-attention sees; needed with None or a mask of two
            dimensions, as one of three or four already shows it.
        triangle: whether the self-attention always hides later positions, even if the mask does not.

    Returns:
        `(mask, is_causal)`: the mask, boolean (True is kept) or additive, broadcastable to `[b, h, q, k]`; and whether
        causality still has to be applied, which is only the case without a mask.

    Raises:
        UnsupportedError: for another type or shape.
    """
    if window is not None and window >= kv_len:
        window = None
    if mask is None:
        if causal and (window is not None or 1 < q_len != kv_len):
            return _causal(q_len, kv_len, window, device), False
        return None, causal and q_len > 1
    if not isinstance(mask, Tensor):
        return _dense_block_mask(mask, q_len, kv_len, device), False
    shape = list(mask.shape)
    if mask.dim() == 2:
        mask = _key_mask(mask)
    elif mask.dim() == 3:
        mask = mask[:, None]
    if mask.dim() != 4:
        raise UnsupportedError(f"attention_mask of shape {shape} is not supported: use 2 to 4 dimensions.")
    if mask.shape[1] != 1:
        mask = _shared_by_heads(mask, q_len)
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        mask = mask != 0
    if mask.shape[-1] > kv_len:  # static caches: the mask covers slots that are not filled yet
        mask = mask[..., :kv_len]
    if mask.shape[-2] > q_len:
        mask = mask[..., -q_len:, :]
    if causal and (triangle or (mask.shape[-2] == 1 and (q_len > 1 or window is not None))):
        keep = _causal(q_len, kv_len, window, device)
        mask = mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, torch.finfo(mask.dtype).min)
    return mask, False


def kept(mask: Any, form: str) -> Any:
    """A mask in the usual form, see `BlockSites.mask`."""
    if form == "mapping":
        return None if mask is None else mask.get("causal")
    if form == "kept" or not isinstance(mask, Tensor):
        return mask
    return ~mask.bool() if form == "hidden" else mask >= 0


def packed_mask(lengths: Tensor, tokens: int) -> Tensor:
    """`[1, 1, n, n]` for packed sequences, where a token sees its own sequence only.

    Args:
        lengths: `[s + 1]`, cumulative, from 0.
        tokens: `n`.
    """
    sequence = torch.bucketize(torch.arange(tokens, device=lengths.device), lengths[1:], right=True)
    return (sequence[:, None] == sequence)[None, None]


@dataclass(frozen=True)
class CallMask:
    """The mask of one call of a block, converted to the form of `functional.attend` on demand."""

    mask: Any
    extra: Any
    causal: bool
    device: torch.device
    rows: Tensor | None = None
    tokens: tuple[int, int, int] | None = None
    window: int | None = None
    triangle: bool = False

    def select(self, rows: Tensor) -> CallMask:
        """The mask of the examples with these indices, in a batch that may repeat the mask's."""
        return replace(self, rows=rows)

    def slice_tokens(self, start: int, end: int, length: int) -> CallMask:
        """The mask among the tokens `start:end` of `length`."""
        if self.tokens is not None:  # a slice of a slice
            offset, _, length = self.tokens
            start, end = start + offset, end + offset
        return replace(self, tokens=(start, end, length))

    def visible(self, q_len: int, kv_len: int) -> Tensor | None:
        """`[b or 1, q_len, kv_len]`, whether a query sees a key, or None if every query sees every key."""
        # Where the host keeps a sliding window, its mask has no columns for the keys in front of the window.
        keys = min(kv_len, self.mask.shape[-1]) if isinstance(self.mask, Tensor) else kv_len
        mask, is_causal = self(q_len, keys)
        if mask is None:
            return _causal(q_len, keys, None, self.device)[0] if is_causal else None
        keep = mask if mask.dtype == torch.bool else mask > _HIDDEN
        return F.pad(keep[:, 0].expand(-1, q_len, -1), (kv_len - keys, 0))

    def __call__(self, q_len: int, kv_len: int) -> tuple[Tensor | None, bool]:
        if self.tokens is None:
            mask, is_causal = self._whole(q_len, kv_len)
        else:
            start, end, length = self.tokens
            mask, is_causal = self._whole(length, length)
            if mask is not None:
                mask = mask[..., start:end]
                mask = mask[..., start:end, :] if mask.shape[-2] > 1 else mask
        if mask is not None and self.rows is not None and mask.shape[0] > 1:
            size: Any = mask.shape[0]  # ONNX divides by no symbol
            size = size if isinstance(size, int) else torch.scalar_tensor(size, dtype=torch.long, device=mask.device)
            mask = mask.index_select(0, self.rows % size)
        return mask, is_causal

    def _whole(self, q_len: int, kv_len: int) -> tuple[Tensor | None, bool]:
        first = normalise_mask(
            self.mask,
            q_len=q_len,
            kv_len=kv_len,
            causal=self.causal,
            device=self.device,
            window=self.window,
            triangle=self.triangle,
        )
        if self.extra is None:
            return first
        # CLIP's text blocks (transformers 4.57) get padding and causality as two masks.
        second = normalise_mask(self.extra, q_len=q_len, kv_len=kv_len, causal=False, device=self.device)[0]
        assert second is not None
        if first[0] is None:
            return second, False
        if first[0].dtype == torch.bool:
            return second.masked_fill(~first[0], torch.finfo(second.dtype).min), False
        return first[0] + second, False
