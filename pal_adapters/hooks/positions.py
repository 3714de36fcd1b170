"""The position of each token in its sequence, derived from what a self-attention sees.

A token's index in the batch is not its position: padding on the left shifts a sequence, and a packed row holds several
sequences. The mask of a self-attention reveals both, so nothing has to be kept between the blocks of a call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.blocks import signatures
from pal_adapters.blocks.sites import Block
from pal_adapters.errors import UnsupportedError
from pal_adapters.nn.tracing import exporting

from .call import CallValue
from .masks import CallMask


class CountedPositions:
    """The positions of a call's tokens according to the caller's arguments, for blocks that see a window.

    A model without `position_ids` counts padding on the left too, and a block that sees a window no longer sees that
    padding: only the caller's mask shows it.

    Args:
        model: the model that holds the block.
        block: the block.
    """

    def __init__(self, model: nn.Module, block: Block) -> None:
        self._call = CallValue()
        self._handles: list[Any] = []
        path = block.name
        while path:
            path = path.rpartition(".")[0]
            owner = model.get_submodule(path)
            arguments = signatures.positions_of(owner)
            if {"attention_mask", "position_ids"} <= arguments.keys():
                on_call = functools.partial(self._on_call, arguments=arguments)
                self._handles.append(owner.register_forward_pre_hook(on_call, with_kwargs=True))
                self._handles.append(owner.register_forward_hook(self._forget, always_call=True))

    def remove(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _on_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, arguments: dict[str, int]
    ) -> None:
        mask, ids = (
            signatures.argument((name,), arguments, args, kwargs) for name in ("attention_mask", "position_ids")
        )
        # A model of several parts may pass on a mapping of masks in the place of its caller's mask.
        if self._call.value is None or mask is None or isinstance(mask, Tensor):
            self._call.value = mask, ids

    def _forget(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._call.value = None

    def of_call(self, ids: Tensor | None, queries: int, total: int) -> Tensor | None:
        """`[b, q]`, or None if they cannot be known.

        Args:
            ids: the `position_ids` that the model passes to the block.
            queries: how many tokens the call has.
            total: how many there were so far, with them.
        """
        if not self._handles:
            return None
        mask, given = self._call.value or (None, None)
        if mask is None:
            return ids
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < total:
            return None if given is None else ids
        counted = (mask[:, :total].long().cumsum(-1) - 1).clamp(min=0)[:, -queries:]
        if given is None or ids is None or ids.dim() != 2:
            return counted
        # Positions that count padding exceed the mask's count; those of packed texts start again below it.
        return torch.minimum(ids.to(counted), counted)


def keys_seen(mask: Any, total: int) -> int:
    """How many of `total` tokens a self-attention sees as keys: a sliding cache only keeps the last ones."""
    return min(total, mask.shape[-1]) if isinstance(mask, Tensor) and mask.dim() == 4 else total


def token_positions(
    mask: CallMask, *, queries: int, total: int, ids: Tensor | None = None, what: str = "the self-attention"
) -> tuple[Tensor, Tensor]:
    """The positions of the queries and of the keys of one call, counted from 0 in each sequence.

    Args:
        mask: who sees whom.
        queries: how many tokens the call has.
        total: how many there were so far, with them.
        ids: `[b, q]` or `[1, q]`, the positions that the host counts, for a call that sees a window of earlier tokens.
        what: names the module in errors.

    Returns:
        `[b, q]` and `[b, k]` for the `k` keys that are seen; `[1, q]` and `[1, k]` if all examples have the same.
        The positions of padding are arbitrary.

    Raises:
        UnsupportedError: if the positions cannot be known.
    """
    keys = keys_seen(mask.mask, total)
    slots = torch.arange(total - keys, total, device=mask.device)[None]
    windowed = mask.window is not None and total > mask.window
    if windowed and queries < total:
        if ids is None or ids.dim() != 2:
            raise UnsupportedError(
                f"{what} sees a window of {mask.window} tokens, so that the positions of its tokens cannot be known: "
                "pass position_ids, or use_cache=False."
            )
        shift = slots[:, -1:] - ids[:, -1:].to(slots)
        keys_at = (slots - shift).clamp(min=0)
        return keys_at[:, -queries:], keys_at
    visible = mask.visible(queries, keys)
    if visible is None:
        return slots[:, -queries:], slots
    real, start = _sequences(visible) if queries == keys else (visible[:, -1], None)
    keys_at = _positions(real, start)
    return keys_at[:, -queries:], keys_at


def real_tokens(visible: Tensor) -> Tensor:
    """Which tokens are not padding, `[b, k]`, from which token sees which, `[b, k, k]`."""
    # Some hosts let padding see everything, as it would otherwise see nothing.
    nothing = visible.all(-1) & ~visible[:, -1]
    return visible.diagonal(dim1=-2, dim2=-1) & ~nothing


def _sequences(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are real and which of them start a sequence, `[b, k]`, from which token sees which, `[b, k, k]`.

    A sequence starts with a token that sees none before it. A window does not change that: every later token sees its
    neighbour.
    """
    real = real_tokens(visible)
    return real, real & ~visible.tril(-1).any(-1)


def _positions(real: Tensor, start: Tensor | None) -> Tensor:
    """The positions of real tokens in their sequences, `[b, k]`; padding after a token continues its count."""
    slots = torch.arange(real.shape[1], device=real.device)
    count = real.cumsum(-1) - 1
    if start is not None:
        count = count - _running_maximum(torch.where(start, count, 0))
    return count.clamp(min=-1) + slots - _running_maximum(torch.where(real, slots, -1))


def _running_maximum(values: Tensor) -> Tensor:
    """The running maximum, `[b, k]`; all values are at least -1."""
    if not exporting():
        return values.cummax(-1).values
    length = values.shape[-1]  # ONNX has no running maximum
    later = torch.ones(length, length, dtype=torch.bool, device=values.device).triu(1)
    return values[:, None].masked_fill(later, -1).amax(-1)
