"""Used by several methods: the default width of a PAL for a model, and checks of `pal_input`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pal_adapters.blocks.sites import Block
from pal_adapters.errors import ConfigError

MOST_HEADS = 1024
"""More attention heads than any model has."""


def pal_parameters(width: int, hidden_size: int, depth: int) -> int:
    """Parameters that one task's PALs add, `2 d r + r + d + 3 L (r^2 + r)`."""
    d, r = width, hidden_size
    return 2 * d * r + r + d + 3 * depth * (r * r + r)


def default_hidden_size(width: int, depth: int, base_parameters: int, num_heads: int = 6) -> int:
    """The PAL width for `hidden_size=None`.

    204 for `d = 768` (the authors') and 264 for `d = 1024`; otherwise the smallest multiple of `num_heads` with
    which eight tasks make the model at least 1.13 times as large, the paper's budget.

    Args:
        base_parameters: parameters of the pretrained model.
    """
    fixed = {768: 204, 1024: 264}.get(width)
    if fixed is not None and fixed % num_heads == 0:
        return fixed
    hidden_size = num_heads
    while 8 * pal_parameters(width, hidden_size, depth) < math.ceil(0.13 * base_parameters):
        hidden_size += num_heads
    return hidden_size


def choose_hidden_size(options: Any, blocks: list[Block], base_parameters: int) -> Mapping[str, Any]:
    """A value for `hidden_size=None`, see `default_hidden_size`; nothing if the user set one."""
    if options.hidden_size is not None:
        return {}
    block = blocks[0]
    return {"hidden_size": default_hidden_size(block.width, block.depth, base_parameters, options.num_heads)}


def check_pal_input(pal_input: str, blocks: list[Block]) -> None:
    """Raise `ConfigError` for `pal_input="raw"` if no block has a norm before attention."""
    if pal_input == "raw" and all(block.sites.norm == "post" for block in blocks):
        raise ConfigError(
            "pal_input='raw' has no effect on this model: its blocks are post-LN, so the module reads the "
            "unnormalised input anyway. Leave pal_input='norm'."
        )
