"""Keys and values of task modules, kept inside the host's own generation cache.

A PAL attends, so generating with a cache needs its keys and values of earlier tokens. They are appended to
`Cache.layers` as further layers: beam reordering, cropping and repeating, which transformers does layer by layer,
then reach them without a hook of ours (transformers 4.57 and 5).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

_INDEX = "_pal_adapters_layers"


class _TaskLayer(DynamicLayer):
    """A growing cache layer that `reset` empties, so that static caches may be used again."""

    is_compileable = False

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False


class TaskCache:
    """The slots of one block in a generation cache.

    Args:
        cache: the object that the block got as `past_key_values`.
        owner: any hashable that names the block.
        depth: how many blocks share the cache.
    """

    def __init__(self, cache: Any, owner: object, depth: int) -> None:
        self._cache = cache
        self._owner = owner
        # Caches that grow on demand would hand a slot of ours to the next block: create the host's layers first.
        replicate = getattr(cache, "layer_class_to_replicate", None)
        while replicate is not None and len(cache.layers) < depth:
            cache.layers.append(replicate())

    def update(
        self, slot: object, keys: Tensor, values: Tensor, *, rows: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor]:
        """Append `keys`, `values` `[b, h, n, k]` to `slot` and return all that the slot holds for these rows.

        Args:
            slot: names the adapter (and the layer in it).
            rows: the batch rows that this call is for, or None for all `batch` rows. Rows that a slot never sees
                stay zero, so that every slot has the batch of the cache and can be reordered with it.
        """
        index = self._cache.__dict__.setdefault(_INDEX, {})
        key = (self._owner, slot)
        if key not in index:
            index[key] = len(self._cache.layers)
            self._cache.layers.append(_TaskLayer())
        layer = self._cache.layers[index[key]]
        if rows is None:
            return layer.update(keys, values)
        full = keys.new_zeros(2, batch, *keys.shape[1:])
        full[0, rows], full[1, rows] = keys, values
        all_keys, all_values = layer.update(full[0], full[1])
        return all_keys[rows], all_values[rows]


def task_cache(cache: Any, owner: object, depth: int) -> TaskCache | None:
    """A `TaskCache` for a block, or None when the block runs without a cache.

    A legacy tuple cache has no layers to append to; transformers 4.57 no longer passes one to a block.
    """
    inner = getattr(cache, "self_attention_cache", cache)
    if inner is None or not hasattr(inner, "layers"):
        return None
    return TaskCache(inner, owner, depth)


