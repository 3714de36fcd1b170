"""The arguments and results of a model's modules.

Releases of transformers rename arguments, so what a call passes is recognised by what it is: a cache by its class, the
hidden states by coming first. Masks are recognised by name, and an unknown name is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from pal_adapters.errors import UnsupportedError
from pal_adapters.nn.tracing import tracing

from .origin import uses
from .sites import Block

# Names of arguments, in the order in which they are looked for.
MASK = ("attention_mask", "mask", "key_padding_mask", "attn_mask")
CAUSAL_MASK = ("causal_attention_mask",)
WINDOW_MASK = ("sliding_window_mask",)
TOKEN_MASK = ("to_mask",)  # ones for tokens, `[b, 1, 1, k]`, where sparse attention gets no other mask
POSITION = ("cache_position",)
# Masks that say nothing about which tokens a block sees.
_OTHER_MASKS = frozenset(
    {"head_mask", "layer_head_mask", "cross_attn_layer_head_mask", "encoder_attention_mask", "encoder_mask",
     "cross_attention_mask", "mamba_attention_mask", "conv_mask", "conv_attention_mask", "position_mask",
     "is_index_masked", "padding_mask", "input_features_mask", "all_masked_rows",
     "audio_token_mask", "band_mask", "from_mask", "from_blocked_mask", "to_blocked_mask", "blocked_encoder_mask"}
)  # fmt: skip
_KNOWN_MASKS = _OTHER_MASKS.union(MASK, CAUSAL_MASK, WINDOW_MASK, TOKEN_MASK)
# Packed sequences: several texts one after another in one row.
_PACKED = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")
# transformers 4.57 checkpoints the call of a block, hooks and all, 5 only the function that its class calls `forward`.
CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)
_PLAIN = (Tensor, type(None), bool, int, float, str, tuple, list, Mapping)


@runtime_checkable
class _Updated(Protocol):
    """What other kinds of cache provide: paged caches are not a `Cache`."""

    def update(self, *args: Any, **kwargs: Any) -> Any: ...


def positions_of(module: nn.Module) -> dict[str, int]:
    """The positions of a module's `forward` arguments."""
    module = getattr(module, "base_layer", module)  # PEFT's wrappers take anything
    return {name: i for i, name in enumerate(list(inspect.signature(type(module).forward).parameters)[1:])}


def argument(names: tuple[str, ...], positions: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first of these arguments that a call has, or None; `positions` as `positions_of` gives them."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
        if positions.get(name, len(args)) < len(args):
            return args[positions[name]]
    return None


def hidden_states(positions: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states of a call: the first argument, else the first tensor."""
    first = args[0] if args else kwargs.get(next(iter(positions), ""))
    if isinstance(first, Tensor):
        return first
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The generation cache that a call passes, whatever its argument is called.

    Raises:
        UnsupportedError: for a cache that is not a `transformers.Cache`, and for packed sequences.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            return value
    for value in (*args, *kwargs.values()):
        if not isinstance(value, _PLAIN) and isinstance(value, _Updated):
            raise UnsupportedError(
                f"a {type(value).__name__} is not supported: modules that attend need a transformers Cache. Use "
                "generate() instead of generate_batch(), or use_cache=False."
            )
    if any(kwargs.get(name) is not None for name in _PACKED):
        raise UnsupportedError(
            "packed sequences are not supported by modules that attend: pass one text per row, with an attention_mask."
        )
    return None


def packed_lengths(
    x: Tensor, positions: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The cumulative lengths of packed sequences whose hidden states come as `[n, d]` or `[1, n, d]`, else None."""
    lengths = argument(_PACKED, positions, args, kwargs) if x.dim() == 2 or x.shape[0] == 1 else None
    return lengths if isinstance(lengths, Tensor) else None


def check_masks(positions: dict[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedError` for a mask under a name that is not known."""
    named = dict(zip(positions, args, strict=False)) | kwargs
    for name, value in named.items():
        if "mask" in name and name not in _KNOWN_MASKS and isinstance(value, Tensor):
            raise UnsupportedError(
                f"an attention mask named {name!r} is not known: it may hide tokens from a module that attends. The "
                f"known ones are {', '.join(sorted(_KNOWN_MASKS))}."
            )


def check_whole(name: str, mask: Any, length: int, kwargs: dict[str, Any], *, causal: bool) -> None:
    """Raise if a call without a cache sees more tokens than it gets: it has a cache that was not recognised.

    Args:
        name: of the block.
        mask: its attention mask.
        length: how many tokens it gets.
        kwargs: what its self-attention got.
        causal: whether later positions are hidden.

    Raises:
        UnsupportedError: if so.
    """
    seen = _reach(mask, length)
    if seen == length == 1 and causal and not tracing():
        position = kwargs.get("cache_position", kwargs.get("position_ids"))
        if isinstance(position, Tensor) and position.numel() and not position.is_floating_point():
            seen = int(position.min()) + 1
    if seen > length:
        raise UnsupportedError(
            f"{name} gets {length} of {seen} tokens, and no generation cache that could hold the others of a module "
            "that attends: pass a transformers Cache (past_key_values or cache), or the whole text with "
            "use_cache=False."
        )


def _reach(mask: Any, length: int) -> int:
    """How many keys a mask covers, without the unused one that some models of transformers 4.57 leave at its end."""
    if not isinstance(mask, Tensor) or mask.dim() < 2:
        return length
    keys = mask.shape[-1]
    if keys == length + 1 and mask.dim() == 4:
        if tracing():
            return length
        last = mask[:, :, -1, -1]  # the last token sees itself, which is the last key of a call with a cache
        return keys if bool((last if last.dtype == torch.bool else last == 0).any()) else length
    return keys


def is_causal(attention: nn.Module) -> bool:
    """Whether a self-attention hides later positions by itself."""
    for module in (attention, getattr(attention, "self", None)):
        if getattr(module, "is_causal", False) is True or getattr(module, "is_decoder", False) is True:
            return True
    return keeps_triangle(attention)


def keeps_triangle(attention: nn.Module) -> bool:
    """Whether a self-attention hides later positions whatever its mask says (the first GPT, ImageGPT)."""
    triangle = dict(attention.named_buffers(recurse=False)).get("bias")
    return triangle is not None and triangle.dim() == 4 and triangle.shape[-1] == triangle.shape[-2] > 1


def window_of(attention: nn.Module, block: Block) -> int | None:
    """How many positions a causal self-attention sees, None for all.

    Needed where no mask says so: flash attention gets none, and others get none while the text fits in the window.
    """
    if getattr(attention, "is_sliding", True) is False:
        return None  # EXAONE 4: full attention that holds the window of its neighbours all the same
    config = getattr(attention, "config", None)
    kinds, index = getattr(config, "layer_types", None), layer_index(attention, block)
    kind = kinds[index] if kinds is not None and index < len(kinds) else None
    if kind == "full_attention":
        return None
    told = hasattr(attention, "sliding_window")
    window = getattr(attention, "sliding_window", None)
    if not told and (kinds is None or kind == "sliding_attention") and _reads_window(attention, config):
        window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def _reads_window(attention: nn.Module, config: Any) -> bool:
    """Whether the model of a self-attention applies its config's window: Moshi's has one and sees all tokens."""
    # Flash attention's kernels get the window from the config.
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        return True
    return uses(attention, "create_sliding_window_causal_mask")


def layer_index(attention: nn.Module, block: Block) -> int:
    """The number of a self-attention in the generation cache."""
    for module in (attention, getattr(attention, "self", None)):
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            return index
    return block.index


def first_of(output: Any) -> Tensor:
    """What a module returned, or the first of several values."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_first(output: Any, value: Tensor) -> Any:
    """What a module returned, with `value` in the place of `first_of`."""
    if isinstance(output, (tuple, list)):
        return type(output)([value, *output[1:]])
    return value
