"""Keys and values of task modules, kept inside the host's own generation cache.

A PAL attends, so generating with a cache needs its keys and values of earlier tokens. They are appended to
`Cache.layers` as further layers: beam reordering, cropping and repeating, which transformers does layer by layer,
then reach them without a hook of ours (transformers 4.57 and 5). Each is of the kind of the host's own layer (growing,
sliding or static), so it holds the same tokens and the host's mask fits it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from pal_adapters.errors import UnsupportedError

_SLOTS = "_pal_adapters_slots"


class _Slot:
    """What our layers have beside the host's kinds of layer.

    Attributes:
        tokens: how many tokens it has seen since it was empty.
        started: whether it has seen any; does not change from token to token, so that compiled code may test it.
    """

    tokens = 0
    started = False

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
    """Holds all tokens, in memory that does not move."""


class _StaticSliding(_Slot, StaticSlidingWindowLayer):
    """Holds the tokens of a sliding window, in memory that does not move."""


def _layer_like(host: Any) -> Any:
    if isinstance(host, StaticSlidingWindowLayer):
        return _StaticSliding(max_cache_len=host.max_cache_len, sliding_window=host.max_cache_len)
    if isinstance(host, StaticLayer):
        return _Static(max_cache_len=host.max_cache_len)
    if isinstance(host, DynamicSlidingWindowLayer):
        return _Sliding(sliding_window=host.sliding_window)
    return _Growing()


class TaskCache:
    """The slots of one block in a generation cache.

    Args:
        cache: the object that the block got as `past_key_values`.
        owner: any hashable that names the block.
        index: the host's own layer of this block in the cache.
        depth: how many blocks share the cache.
        position: the positions of this call's tokens, where the host says them.
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
        """Append `keys`, `values` `[b, h, n, k]` to `slot` and return all that the slot holds for these rows.

        Args:
            slot: names the adapter (and the layer in it).
            rows: the batch rows that this call is for, or None for all `batch` rows. Rows that a slot never sees
                stay zero, so that every slot has the batch of the cache and can be reordered with it.

        Raises:
            UnsupportedError: if the cache holds tokens that this slot has not seen.
        """
        host = self._host_layer()
        length = keys.shape[2]
        seen = host.get_seq_length() if isinstance(host, CacheLayerMixin) else None
        if isinstance(seen, int) and seen == 0:
            return keys, values  # the host does not cache: activation checkpointing takes the cache from its attention
        layer = self._own_layer((self._owner, slot, keys.shape[1], keys.shape[3]), host)
        fresh = not layer.started
        self._check(slot, layer, length, seen)
        if hasattr(host, "record_past"):  # transformers 5, assisted decoding
            layer.record_past = host.record_past
        position = self._position
        counts = isinstance(getattr(host, "cumulative_length", None), Tensor)  # transformers 5
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
        # Where the host passes no mask, the places of a static cache that no token has filled yet must not count.
        return (keys, values) if fresh else (all_keys, all_values)

    def _host_layer(self) -> Any:
        # Caches that grow on demand would hand a slot of ours to the next block: create the host's layers first.
        replicate = getattr(self._cache, "layer_class_to_replicate", None)
        while replicate is not None and len(self._cache.layers) < self._depth:
            self._cache.layers.append(replicate())
        return self._cache.layers[self._index]

    def _own_layer(self, key: object, host: Any) -> Any:
        slots = getattr(self._cache, _SLOTS, None)
        if slots is None:
            slots = {}
            setattr(self._cache, _SLOTS, slots)
        if key not in slots:
            slots[key] = len(self._cache.layers)
            self._cache.layers.append(_layer_like(host))
        return self._cache.layers[slots[key]]

    def _check(self, slot: object, layer: Any, length: int, seen: Any) -> None:
        # Reading the length of a static cache waits for the device: only done for an empty slot.
        if seen is None or (isinstance(seen, Tensor) and (layer.started or torch.compiler.is_compiling())):
            return
        before, own = int(seen) - length, layer.get_seq_length() if layer.started else 0
        if before != own:
            raise UnsupportedError(
                f"the generation cache holds {before} earlier tokens, of which the active adapter "
                f"({slot[0] if isinstance(slot, tuple) else slot!r}) has seen {own}: keep the same adapter active "
                "from the first token on, start with an empty cache, or pass use_cache=False."
            )


def task_cache(cache: Any, owner: object, index: int, depth: int, position: Tensor | None = None) -> TaskCache | None:
    """A `TaskCache` for a block, or None when the block runs without a cache.

    A legacy tuple cache has no layers to append to; transformers 4.57 no longer passes one to a block.
    """
    inner = getattr(cache, "self_attention_cache", cache)
    if inner is None or not hasattr(inner, "layers"):
        return None
    return TaskCache(inner, owner, index, depth, position)
