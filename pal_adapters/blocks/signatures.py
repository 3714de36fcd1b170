"""What the modules of a model are called with and return. Knows no method and neither host."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .sites import Block

# Names of arguments, in the order in which they are looked for.
HIDDEN = ("hidden_states", "hidden_state", "query", "x")
MASK = ("attention_mask", "mask", "attn_mask")
CAUSAL_MASK = ("causal_attention_mask",)
CACHE = ("past_key_values", "past_key_value", "layer_past")
POSITION = ("cache_position",)
# transformers 4.57 checkpoints the call of a block, hooks and all, 5 only the function that its class calls `forward`.
CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)


def positions_of(module: nn.Module) -> dict[str, int]:
    """Where a module's `forward` takes its arguments."""
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


def is_causal(attention: nn.Module) -> bool:
    """Whether a self-attention hides later positions by itself."""
    for module in (attention, getattr(attention, "self", None)):
        if getattr(module, "is_causal", False) is True or getattr(module, "is_decoder", False) is True:
            return True
    # The first GPT keeps the triangle itself and gets no mask that has it.
    triangle = dict(attention.named_buffers(recurse=False)).get("bias")
    return triangle is not None and triangle.dim() == 4 and triangle.shape[-1] == triangle.shape[-2] > 1


def window_of(attention: nn.Module) -> int | None:
    """How many positions a causal self-attention sees, where it says so; flash attention gets no mask that does."""
    config = getattr(attention, "config", None)
    window = getattr(attention, "sliding_window", None)
    if not hasattr(attention, "sliding_window") and getattr(config, "layer_types", None) is None:
        window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


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
