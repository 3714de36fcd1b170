"""What a unit may read besides the value it changes: the block's inputs, the attention mask, earlier tokens.

Plain torch. The protocols define what a unit may call; `hooks/` implements them for models of transformers.

Legend: b examples, n tokens of this call, m tokens so far, d model width, r inner width, h heads, k width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pal_adapters.errors import UnsupportedError

from .tracing import tracing


class KeyValueCache(Protocol):
    """What a unit keeps of earlier tokens during generation.

    It is reordered, repeated and cropped together with the host's keys and values. Units do not call this class, but
    `self_attention`, `UnitInputs.visible_tokens`, `UnitInputs.extend` and `UnitInputs.carry`.
    """

    def update(
        self, slot: object, keys: Tensor, values: Tensor, *, rows: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[b, h, n, k]` to a slot and return everything that attention may read.

        Pass the length of the result as `kv_len` to the mask. It has fewer tokens than there were if a sliding window
        dropped some, and may end with unused places of a static cache, which the mask hides.

        Args:
            slot: identifies the unit and the place in it.
            keys, values: those of this call's tokens.
            rows: the indices of their examples in the batch, or None for all.
            batch: the size of the whole batch.
        """

    def extend(
        self, slot: object, tokens: Tensor, *, rows: Tensor | None, batch: int, last: int | None = None
    ) -> tuple[Tensor, int | Tensor]:
        """Append one vector per token, `[b, n, r]`, to a slot and return them after the earlier ones.

        Unlike `update`, it ignores sliding windows: a convolution also gets the tokens before the window.

        Args:
            slot: identifies the unit and the place in it.
            tokens: the vectors of this call's tokens.
            rows: the indices of their examples in the batch, or None for all.
            batch: the size of the whole batch.
            last: how many earlier tokens are needed, None for all.

        Returns:
            The tokens, oldest first, and how many came before this call, which is the position of its first token. The
            tokens are `[b, m, r]` with `last=None`, and otherwise `[b, last + n, r]`, zero-padded at the front. The
            number is an integer, or a scalar tensor in a graph compiled with a static cache.

        Raises:
            UnsupportedError: if the cache holds tokens that this slot has not seen; if the sliding window of a static
                cache is too short; for `last=None` in a graph compiled with a static cache.
        """

    def carry(
        self,
        slot: object,
        step: Callable[[Tensor], Tensor],
        initial: Tensor,
        *,
        rows: Tensor | None,
        batch: int,
    ) -> Tensor:
        """Continue a recurrence, and keep the state after each token in a slot.

        Works with every kind of cache, also in a compiled graph, as only the last state is read.

        Args:
            slot: identifies the unit and the place in it.
            step: see `UnitInputs.carry`.
            initial: `[b, r]`, the state before the first token.
            rows: the indices of their examples in the batch, or None for all.
            batch: the size of the whole batch.

        Returns:
            `[b, n, r]`, what `step` returned.

        Raises:
            UnsupportedError: if the cache holds tokens that this slot has not seen.
        """


class MaskFunction(Protocol):
    """Which tokens see which in one call of a block, in two forms."""

    def __call__(self, q_len: int, kv_len: int, /) -> tuple[Tensor | None, bool]:
        """`(mask, is_causal)` for `functional.attend` with `q_len` queries and `kv_len` keys.

        The mask is boolean (True is kept) or added to the scores, and broadcasts to `[b, h, q_len, kv_len]`. With
        None, only `is_causal` hides anything.
        """

    def visible(self, q_len: int, kv_len: int, /) -> Tensor | None:
        """One boolean tensor, `[b or 1, q_len, kv_len]`: whether query `i` sees key `j`. None if all see all.

        The last key is this call's last token. Position biases, which a mask adds to scores without hiding a key, are
        left out.
        """

    def select(self, rows: Tensor, /) -> MaskFunction:
        """The mask of the examples with these indices in the mask's batch, or in a repetition of it."""

    def slice_tokens(self, start: int, end: int, length: int, /) -> MaskFunction:
        """The mask among the tokens `start:end` of `length`."""


class _NoMask:
    """Every token sees every token."""

    def __call__(self, q_len: int, kv_len: int) -> tuple[Tensor | None, bool]:
        return None, False

    def visible(self, q_len: int, kv_len: int) -> Tensor | None:
        return None

    def select(self, rows: Tensor) -> _NoMask:
        return self

    def slice_tokens(self, start: int, end: int, length: int) -> _NoMask:
        return self


no_mask = _NoMask()


class UnitInputs(NamedTuple):
    """What a unit may read besides the value it changes.

    Attributes:
        x: `[b, n, d]`, the input of self-attention: the block's input, normalised in pre-LN blocks.
        raw: `[b, n, d]`, the block's input itself.
        h: `[b, n, d]`, the feed-forward input. All three are None if no unit needs them.
        mask: the host's attention mask for this call.
        cache: earlier tokens, or None outside generation.
        rows: the indices of the examples in `x` in the batch, or None for all.
        batch: the size of the whole batch.
        slot: identifies this unit in `cache`.
    """

    x: Tensor | None = None
    raw: Tensor | None = None
    h: Tensor | None = None
    mask: MaskFunction = no_mask
    cache: KeyValueCache | None = None
    rows: Tensor | None = None
    batch: int = 0
    slot: tuple[object, ...] = ()

    def read(self, name: str) -> Tensor:
        """`x`, `raw` or `h`."""
        tensor = getattr(self, name)
        if tensor is None:
            raise UnsupportedError(
                f"{name} was not captured: add it to the unit's needs. If it is there, the block did not call the "
                "modules that its sites name, or was called from within itself."
            )
        return tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> UnitInputs:
        """The inputs with `function` applied to `x`, `raw` and `h`."""
        x, raw, h = (None if t is None else function(t) for t in (self.x, self.raw, self.h))
        return self._replace(x=x, raw=raw, h=h)

    def visible_tokens(self, tokens: Tensor, *, slot: object = "") -> tuple[Tensor, Tensor | None]:
        """Vectors of all tokens that attention could read in this call, and which of them each token sees.

        For a mean, a maximum or anything else over the visible tokens. It follows the host's attention with every
        kind of cache: tokens that have left a sliding window are missing, and the unused slots of a static cache are
        there but not visible.

        Args:
            tokens: `[b, n, r]`, computed from each token on its own.
            slot: distinguishes several uses in one unit.

        Returns:
            The vectors, `[b, m, r]`, and a boolean mask, `[b or 1, n, m]`, or None if every token sees every other.
            A padding token may see none.

        Example:
            ```python
            tokens, visible = inputs.visible_tokens(tokens)
            mean = masked_mean(tokens, visible)  # nn/functional.py
            ```
        """
        length = tokens.shape[1]
        if self.cache is not None:
            keys = tokens.unsqueeze(1)
            tokens = self.cache.update((*self.slot, slot), keys, keys, rows=self.rows, batch=self.batch)[0].squeeze(1)
        return tokens, self.mask.visible(length, tokens.shape[1])

    def extend(self, tokens: Tensor, *, last: int | None = None, slot: object = "") -> tuple[Tensor, int | Tensor]:
        """This call's vectors preceded by those of earlier tokens, whether visible or not; also without a cache.

        For a convolution; see `KeyValueCache.extend`. A recurrence is better served by `carry`, and what depends on
        the visible tokens alone by `visible_tokens`: both work with every cache.

        Args:
            tokens: `[b, n, r]`, computed from each token on its own.
            last: how many earlier tokens are needed. None for all, which a compiled graph or a sliding window in a
                static cache cannot give.
            slot: distinguishes several uses in one unit.

        Returns:
            The tokens, `[b, m, r]` or `[b, last + n, r]`, and how many came before this call.

        Example:
            ```python
            window, _ = inputs.extend(tokens, last=kernel - 1)  # a causal depthwise convolution, weight [r, 1, kernel]
            y = F.conv1d(window.transpose(1, 2), weight, groups=weight.shape[0]).transpose(1, 2)
            ```
        """
        if self.cache is None:
            return F.pad(tokens, (0, 0, last or 0, 0)), 0
        return self.cache.extend((*self.slot, slot), tokens, rows=self.rows, batch=self.batch, last=last)

    def carry(self, step: Callable[[Tensor], Tensor], initial: Tensor, *, slot: object = "") -> Tensor:
        """The states of a recurrence over all tokens so far, for the tokens of this call; also without a cache.

        The state after every token is kept, not only the last, so that the cache can be cropped (assisted decoding).

        Args:
            step: takes the state before this call's tokens, `[b, r]`, and returns the states after each of them,
                `[b, n, r]`. It is up to `step` to skip padding, which `mask` shows.
            initial: `[b, r]`, the state before the first token.
            slot: distinguishes several uses in one unit.

        Returns:
            `[b, n, r]`, what `step` returned.

        Example:
            ```python
            def step(state):  # s_t = decay s_(t-1) + u_t
                states = [state := decay * state + token for token in u.unbind(1)]
                return torch.stack(states, 1)

            states = inputs.carry(step, torch.zeros_like(u[:, 0]))
            ```
        """
        if self.cache is None:
            return step(initial)
        return self.cache.carry((*self.slot, slot), step, initial, rows=self.rows, batch=self.batch)


class BatchTasks(NamedTuple):
    """The tasks of a batch's examples, for modules that serve many tasks.

    Attributes:
        tasks: `[c]`, the tasks in the batch, each once; None for all tasks.
        member: `[b]`, the index in `tasks` of each example's task.
    """

    tasks: Tensor | None
    member: Tensor

    def to(self, device: torch.device) -> BatchTasks:
        """The same on a device."""
        return BatchTasks(None if self.tasks is None else self.tasks.to(device), self.member.to(device))


def batch_tasks(numbers: Tensor) -> BatchTasks:
    """`BatchTasks` from `[b]`, the number of each example's task.

    Absent tasks then cost nothing and do not change the rounding of the others. In a compiled graph, where sizes must
    not depend on values, every task counts as present.
    """
    if tracing():
        return BatchTasks(None, numbers)
    return BatchTasks(*numbers.unique(return_inverse=True))
