"""What task modules keep of earlier tokens, in the host's own generation cache.

A PAL attends, so generating with a cache needs its keys and values of earlier tokens. They are appended to
`Cache.layers` as additional layers: beam reordering, cropping and repeating, which transformers does layer by layer,
then reach them without further hooks (transformers 4.57 and 5). Keys and values are kept in the same kind of layer
as the host's own (growing, sliding or static), so they cover the same tokens and the host's mask fits them. Tokens for
a convolution (`extend`) and states (`carry`) are kept without a window wherever the host's cache grows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from pal_adapters.errors import UnsupportedError
from pal_adapters.nn.tracing import tracing

_SLOTS = "_pal_adapters_slots"


class _Slot:
    """What the layers of this package add to the host's kinds of cache layer.

    Attributes:
        tokens: how many tokens it has seen since it was empty, if the host does not count them.
        started: whether it has seen any; does not change from token to token, so compiled code may test it.
    """

    tokens = 0
    started = False

    def earlier(self, position: Tensor | None) -> int | Tensor:
        """How many tokens it has seen; `position` has the positions of this call's tokens, if the host passes them."""
        if not self.started:
            return 0
        layer: Any = self
        count = layer.cumulative_length if hasattr(layer, "cumulative_length") else None
        count = getattr(layer, "cumulative_length_int", count)  # transformers 5, static and sliding
        if count is None and isinstance(layer, StaticLayer):  # transformers 4.57
            return self.tokens if position is None else position[0]
        if count is None:
            return layer.get_seq_length()
        return count.clone() if isinstance(count, Tensor) else count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the examples, also where the first, of another adapter, is zero: the host skips such layers."""
        layer: Any = self
        if layer.is_initialized:
            held = {
                name: value for name, value in vars(self).items() if isinstance(value, Tensor) and value.dim() == 4
            }
            for name, value in held.items():
                setattr(self, name, value.index_select(0, beam_idx.to(value.device)))

    def reset(self) -> None:
        self.tokens, self.started = 0, False
        layer: Any = self
        if isinstance(layer, DynamicLayer):
            # transformers 4.57 fills a growing layer with zeros and keeps its length.
            layer.keys = layer.values = None
            layer.is_initialized = False
        super().reset()  # type: ignore[misc]


class _Growing(_Slot, DynamicLayer):
    """Holds all tokens."""


class _Sliding(_Slot, DynamicSlidingWindowLayer):
    """Holds the tokens of a sliding window."""


class _Static(_Slot, StaticLayer):
    """Holds all tokens, in preallocated memory."""


class _StaticSliding(_Slot, StaticSlidingWindowLayer):
    """Holds the tokens of a sliding window, in preallocated memory."""


@runtime_checkable
class _KeepsPrompt(Protocol):
    """A sliding layer that keeps the whole prompt and slides over what is generated (Unlimited-OCR)."""

    prefill_length: int | None

    def set_prefill_length(self, prefill_length: int) -> None: ...


@functools.cache
def _slot_of(kind: type[DynamicSlidingWindowLayer]) -> type:
    """A model's own kind of sliding layer, as a slot."""
    # transformers 5 makes the layers of new caches of the last class that names a layer type.
    return type(f"Slot{kind.__name__}", (_Slot, kind), {"_layer_type": None})


def _layer_like(host: Any) -> Any:
    if not isinstance(host, DynamicSlidingWindowLayer):
        return _layer_of_all(host)
    if type(host) is DynamicSlidingWindowLayer:
        return _Sliding(sliding_window=host.sliding_window)
    layer = _slot_of(type(host))(sliding_window=host.sliding_window)
    if isinstance(layer, _KeepsPrompt) and isinstance(host, _KeepsPrompt) and host.prefill_length is not None:
        layer.set_prefill_length(host.prefill_length)
    return layer


def _layer_of_all(host: Any) -> Any:
    """A layer without a window, unless the host's is static: then only the window's length is known.

    Raises:
        UnsupportedError: for a static layer of a model's own kind.
    """
    if isinstance(host, StaticLayer) and isinstance(host, _KeepsPrompt):
        raise UnsupportedError(
            f"a {type(host).__name__} is not supported by modules that attend: generate with a cache that grows "
            "(cache_implementation='dynamic')."
        )
    if isinstance(host, StaticSlidingWindowLayer):
        return _StaticSliding(max_cache_len=host.max_cache_len, sliding_window=host.max_cache_len)
    return _Static(max_cache_len=host.max_cache_len) if isinstance(host, StaticLayer) else _Growing()


class TaskCache:
    """The slots of one block in a generation cache.

    Args:
        cache: the object that the block got as `past_key_values`.
        owner: any hashable that names the block.
        index: the host's own layer of this block in the cache.
        depth: how many blocks share the cache.
        position: the positions of this call's tokens, if the host passes them.
    """

    def __init__(self, cache: Any, owner: object, index: int, depth: int, position: Tensor | None = None) -> None:
        self._cache = cache
        self._owner = owner
        self._index = index
        self._depth = depth
        self._position = position

    def update(
        self, slot: object, keys: Tensor, values: Tensor, *, rows: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor]:
        """Append `keys`, `values` `[b, h, n, k]` to `slot` and return all that the slot holds for these examples.

        Args:
            slot: names the adapter (and the layer in it).
            rows: the indices of this call's examples in the batch, or None for all `batch` examples. Examples that a
                slot never sees stay zero, so that every slot has the cache's batch size and can be reordered with it.

        Raises:
            UnsupportedError: if the cache holds tokens that this slot has not seen.
        """
        host = self._host_layer()
        if self._host_is_empty(host):
            return keys, values
        layer = self._own_layer((self._owner, slot, keys.shape[1], keys.shape[3]), host, _layer_like)
        all_keys, all_values, _ = self._append(slot, layer, host, keys, values, rows, batch)
        return all_keys, all_values

    def extend(
        self, slot: object, tokens: Tensor, *, rows: Tensor | None, batch: int, last: int | None = None
    ) -> tuple[Tensor, int | Tensor]:
        """Append `tokens` `[b, n, r]` to `slot` and return them after the earlier ones.

        Args:
            slot: names the adapter (and the layer in it).
            rows: as in `update`.
            batch: as in `update`.
            last: how many of the earlier tokens are needed, None for all.

        Returns:
            `[b, m, r]`, or `[b, last + n, r]` with zeros in front, and how many tokens came before this call.

        Raises:
            UnsupportedError: see `KeyValueCache.extend`.
        """
        host, length = self._host_layer(), tokens.shape[1]
        if self._host_is_empty(host):
            return _recent(tokens, 0, length, last), 0
        layer = self._own_layer((self._owner, slot, tokens.shape[2]), host, _layer_of_all)
        wide = tokens.unsqueeze(1)
        held, _, earlier = self._append(slot, layer, host, wide, wide, rows, batch)
        if isinstance(earlier, Tensor) and not tracing():
            earlier = int(earlier)
        return _recent(held.squeeze(1), earlier, length, last), earlier

    def carry(
        self,
        slot: object,
        step: Callable[[Tensor], Tensor],
        initial: Tensor,
        *,
        rows: Tensor | None,
        batch: int,
    ) -> Tensor:
        """See `KeyValueCache.carry`; the states are kept as `extend` keeps tokens."""
        host = self._host_layer()
        if self._host_is_empty(host):
            return step(initial)
        layer = self._own_layer((self._owner, slot, initial.shape[1]), host, _layer_of_all)
        states = step(initial if not layer.started else _last(layer, self._position, rows))
        wide = states.unsqueeze(1)
        self._append(slot, layer, host, wide, wide, rows, batch)
        return states

    def _append(
        self, slot: object, layer: Any, host: Any, keys: Tensor, values: Tensor, rows: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor, int | Tensor]:
        """All keys and values of these examples, and how many tokens came before."""
        length, fresh = keys.shape[2], not layer.started
        self._check(slot, layer, length, _seen(host))
        if hasattr(host, "record_past"):  # transformers 5, assisted decoding
            layer.record_past = host.record_past
        position = self._position
        counts = isinstance(getattr(host, "cumulative_length", None), Tensor)  # transformers 5
        earlier = layer.earlier(position)
        if position is None and isinstance(host, StaticLayer) and not counts:
            position = torch.arange(layer.tokens, layer.tokens + length, device=keys.device)
            layer.tokens += length
        layer.started = True
        if rows is None:
            all_keys, all_values = layer.update(keys, values, {"cache_position": position})
        else:
            full = keys.new_zeros(2, batch, *keys.shape[1:])
            full[0, rows], full[1, rows] = keys, values
            all_keys, all_values = layer.update(full[0], full[1], {"cache_position": position})
            all_keys, all_values = all_keys[rows], all_values[rows]
        # If the host passes no mask, the unused places of a static cache must not count.
        return (keys, values, 0) if fresh else (all_keys, all_values, earlier)

    def _host_is_empty(self, host: Any) -> bool:
        """Whether the host does not cache: activation checkpointing takes the cache from its attention."""
        seen = _seen(host)
        return isinstance(seen, int) and seen == 0

    def _host_layer(self) -> Any:
        # A cache that grows on demand would give a slot of this package to the next block: create the host's layers
        # first.
        replicate = getattr(self._cache, "layer_class_to_replicate", None)
        while replicate is not None and len(self._cache.layers) < self._depth:
            self._cache.layers.append(replicate())
        return self._cache.layers[self._index]

    def _own_layer(self, key: object, host: Any, make: Callable[[Any], Any]) -> Any:
        slots = getattr(self._cache, _SLOTS, None)
        if slots is None:
            slots = {}
            setattr(self._cache, _SLOTS, slots)
        if key not in slots:
            slots[key] = len(self._cache.layers)
            self._cache.layers.append(make(host))
        return self._cache.layers[slots[key]]

    def _check(self, slot: object, layer: Any, length: int, seen: Any) -> None:
        # Reading the length of a static cache waits for the device: only done for an empty slot.
        if seen is None or (isinstance(seen, Tensor) and (layer.started or tracing())):
            return
        before, own = int(seen) - length, layer.get_seq_length() if layer.started else 0
        if before != own:
            raise UnsupportedError(
                f"the generation cache holds {before} earlier tokens, of which the active adapter "
                f"({slot[0] if isinstance(slot, tuple) else slot!r}) has seen {own}: keep the same adapter active "
                "from the first token on, start with an empty cache, or pass use_cache=False."
            )


def _seen(host: Any) -> Any:
    """How many tokens the host's layer holds: an integer, a tensor (static caches), or None for an unknown kind."""
    return host.get_seq_length() if isinstance(host, CacheLayerMixin) else None


def _recent(held: Tensor, earlier: int | Tensor, length: int, last: int | None) -> Tensor:
    """The `last` earlier tokens and this call's `length` of what a slot returned, with zeros in front where needed.

    Args:
        held: `[b, places, r]`; a static cache has empty places behind the tokens.
        earlier: how many tokens came before this call.
        length: of this call.
        last: how many of the earlier ones are needed, None for all.
    """
    if isinstance(earlier, Tensor):  # a compiled graph: every shape has to be known
        if last is None:
            raise UnsupportedError(
                "all earlier tokens of a static cache have no fixed number, which a compiled graph needs: pass last=, "
                "or generate without compiling (disable_compile=True)."
            )
        place = torch.arange(last + length, device=held.device) + earlier - last
        return held.index_select(1, place.clamp(min=0)).masked_fill((place < 0)[:, None], 0.0)
    needed = earlier if last is None else min(last, earlier)
    held = held[:, : earlier + length]
    if held.shape[1] < needed + length:
        raise UnsupportedError(
            f"a static cache with a sliding window keeps {held.shape[1] - length} earlier tokens, but {needed} are "
            "needed: generate with a cache that grows."
        )
    held = held[:, held.shape[1] - needed - length :]
    return held if last is None else F.pad(held, (0, 0, last - needed, 0))


def _last(layer: Any, position: Tensor | None, rows: Tensor | None) -> Tensor:
    """The last vector that a layer holds of these examples, `[b, r]`."""
    held, earlier = layer.keys.squeeze(1), layer.earlier(position)
    if isinstance(earlier, Tensor):
        place = earlier.reshape(1).clamp(max=held.shape[1]) - 1
        state = held.index_select(1, place.to(held.device)).squeeze(1)
    else:
        state = held[:, min(earlier, held.shape[1]) - 1]
    return state if rows is None else state[rows]


def task_cache(cache: Any, owner: object, index: int, depth: int, position: Tensor | None = None) -> TaskCache | None:
    """A `TaskCache` for a block, or None when the block runs without a cache.

    A legacy tuple has no layers to append to; transformers 4.57 no longer passes one to a block.
    """
    inner = getattr(cache, "self_attention_cache", cache)
    if inner is None or not hasattr(inner, "layers"):
        return None
    return TaskCache(inner, owner, index, depth, position)
