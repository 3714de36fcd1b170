"""Plain torch functions that take one set of weights for all examples, one set per example, or one per task.

Legend: b batch size, n tokens, d width, r inner width, h heads, c tasks in the batch.

Every weight may carry a leading dimension of examples: `[o, i]` is one matrix for the whole batch, `[b, o, i]` one
matrix per example. `TaskMatrices` are one matrix per task of a batch that is in the order of its tasks. A batch that
mixes tasks is therefore one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


class TaskMatrices:
    """The matrices of the tasks of a batch whose examples are in the order of the tasks.

    Args:
        matrices: `[o, i]` for each task.
        counts: how many examples each has.
    """

    def __init__(self, matrices: Sequence[Tensor], counts: Sequence[int]) -> None:
        self.matrices = tuple(matrices)
        self.counts = tuple(counts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices."""
        return self.matrices[0].dtype

    @property
    def even(self) -> bool:
        """Whether all tasks have the same number of examples."""
        return len(set(self.counts)) == 1

    @cached_property
    def stacked(self) -> Tensor:
        """`[c, o, i]`."""
        return torch.stack(self.matrices)


def batches_tasks(device: torch.device) -> bool:
    """Whether equal numbers of examples run as one batched product over copies of the tasks' matrices.

    Otherwise each task has a product of its own. On a CPU, these are faster, because nothing is copied, and a training
    step keeps no copies of the weights.
    """
    return device.type != "cpu"


def linear(x: Tensor, weight: Tensor | TaskMatrices, bias: Tensor | None) -> Tensor:
    """`x W^T + bias`, computed in the dtype of the weights.

    Args:
        x: `[b, n, i]`.
        weight: `[o, i]`, or `[b, o, i]` for one matrix per example, or one matrix per task.
        bias: `[o]` or `[b, o]`, or None.

    Returns:
        `[b, n, o]` in the dtype of `weight` (under autocast: in autocast's dtype).
    """
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    if isinstance(weight, TaskMatrices):
        if weight.even and batches_tasks(x.device):  # the examples of a task are one long example
            step = weight.counts[0]
            y = linear(x.reshape(len(weight.counts), -1, x.shape[2]), weight.stacked, _every(bias, step))
            return y.view(*x.shape[:2], -1)
        y = torch.cat([*map(F.linear, x.split(weight.counts), weight.matrices)])
        return y if bias is None else y.add_(bias.unsqueeze(1))  # nothing else has seen `y`
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    if bias is None or torch.is_autocast_enabled(x.device.type):
        y = torch.bmm(x, weight.transpose(1, 2))
        return y if bias is None else y + bias.unsqueeze(1)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def _every(bias: Tensor | None, step: int) -> Tensor | None:
    return None if bias is None else bias[::step]


def scale(x: Tensor, vector: Tensor) -> Tensor:
    """`x * vector` with `vector` `[d]` or `[b, d]` broadcast over the tokens of `x` `[b, n, d]`."""
    # In the wider of the two dtypes: near 1, bfloat16 has steps of nearly a hundredth.
    return (x * (vector if vector.dim() == 1 else vector.unsqueeze(1))).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension with `weight`, `bias` `[d]` or `[b, d]`."""
    if weight.dim() == 1:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    y = F.layer_norm(x, weight.shape[-1:], eps=eps)
    return y * weight.unsqueeze(1) + bias.unsqueeze(1)


def masked_mean(tokens: Tensor, visible: Tensor | None) -> Tensor:
    """The mean over the tokens that each token sees; zero for a token that sees none.

    Args:
        tokens: `[b, m, r]`.
        visible: boolean, `[b or 1, n, m]`, or None if every token sees every other.

    Returns:
        `[b, n, r]`, or `[b, 1, r]` for `visible=None`.
    """
    if visible is None:
        return tokens.mean(1, keepdim=True)
    weights = visible.to(torch.promote_types(tokens.dtype, torch.float32))
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return weights.to(tokens.dtype) @ tokens


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`[b, n, r]` -> `[b, h, n, r / h]`."""
    b, n, r = x.shape
    return x.view(b, n, num_heads, r // num_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`[b, h, n, r / h]` -> `[b, n, r]`."""
    b, h, n, k = x.shape
    return x.transpose(1, 2).reshape(b, n, h * k)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, dropout: float) -> Tensor:
    """`softmax(q k^T / sqrt(r / h) + mask) v`, dropout on the probabilities.

    Args:
        q, k, v: `[b, h, n, r / h]` (keys and values may be longer than queries).
        mask: boolean (True is kept) or additive, broadcastable to `[b, h, n_q, n_k]`, or None.
        is_causal: whether to hide later positions; only with `mask=None`.
        dropout: probability, 0 outside training.
    """
    if mask is not None and mask.dtype != torch.bool:
        # A float32 mask holds float32's minimum, which is -inf in a narrower dtype, and the sum of mask and score may
        # overflow too: a query that sees no key would then be NaN.
        floor = max(torch.finfo(q.dtype).min, torch.finfo(mask.dtype).min) / 2
        mask = mask.clamp(min=floor).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
