"""The earlier tokens visible to a module that attends beside a block without attention.

Such a block (a state space model, a gated delta rule, a causal convolution) gets no mask, or one of padding that
covers the tokens of a call alone. What earlier calls hid is kept in the generation cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kv_cache import TaskCache
from .masks import CallMask
from .positions import real_tokens


def kept_tokens(mask: Any, cache: TaskCache | None, value: Tensor) -> Tensor | None:
    """Which of all tokens so far are not padding, `[b, k]`; None if there is no padding.

    Args:
        mask: what the block got: None, `[b, n]` with non-zero for tokens, or the mask of its neighbours' attention.
        cache: the block's slots in the generation cache.
        value: `[b, n, d]`, the tokens of the call.
    """
    if mask is None and cache is None:
        return None
    batch, tokens = value.shape[:2]
    if mask is None:
        keep = value.new_ones(batch, tokens)
    elif mask.dim() == 2:
        keep = (mask[:, -tokens:] != 0).to(value.dtype)
    else:
        visible = CallMask(mask, None, True, value.device).visible(tokens, mask.shape[-1])
        assert visible is not None
        keep = real_tokens(visible[..., -tokens:]).to(value.dtype)
    keep = keep.expand(batch, -1)
    if cache is None:
        return keep
    held: Tensor = cache.extend("mask", keep[..., None], rows=None, batch=batch)[0]
    return torch.squeeze(held, -1)
