"""What both hosts' configs of the modules on top have in common."""

from __future__ import annotations

from typing import Any

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import require_bool, require_int, require_multiple, require_probability
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.hosts.method import Method
from pal_adapters.methods.pal.config import replace_field

from .layer import TopAttention, TopBertLayer


def validate_attention(config: Any) -> None:
    """Check the fields of a top-attention config.

    Raises:
        ConfigError: names the argument, the value and what is allowed.
    """
    for name in ("hidden_size", "num_layers", "num_heads"):
        require_int(name, getattr(config, name), minimum=1)
    require_multiple("hidden_size", config.hidden_size, "num_heads", config.num_heads)
    require_probability("dropout", config.dropout)
    require_bool("legacy_ln_init", config.legacy_ln_init)


def validate_bert_layer(config: Any) -> None:
    """Check the fields of a top-BERT-layer config.

    Raises:
        ConfigError: names the argument, the value and what is allowed.
    """
    if config.num_heads is not None:
        require_int("num_heads", config.num_heads, minimum=1)
    if config.intermediate_size is not None:
        require_int("intermediate_size", config.intermediate_size, minimum=1)
    require_probability("dropout", config.dropout)
    require_bool("legacy_ln_init", config.legacy_ln_init)


def no_identity(config: Any) -> None:
    """Raise `ConfigError` for an identity initialisation, which a module that replaces its input has not."""
    if config.init_weights is True:
        raise ConfigError(
            "init_weights=True is not allowed: the module replaces the output of the last block and has no "
            "initialisation that leaves it as it is. Use init_weights=False, N(0, 0.02^2)."
        )


def _refuse_shared_blocks(blocks: list[Block]) -> None:
    if any(type(b.module).__name__.startswith("Albert") for b in blocks):
        raise UnsupportedError(
            "a module on top of the last block cannot be added to ALBERT, which uses one block at every depth."
        )


def _require_last(blocks: list[Block]) -> None:
    if not any(block.last for block in blocks):
        raise ConfigError(
            f"no last block is among the chosen ones ({', '.join(repr(block.name) for block in blocks)}): the module "
            "stands on top of the last block of a stack, so choose that block or leave the choice out."
        )


def _build_attention(config: Any, block: Block) -> TopAttention | None:
    if not block.last:
        return None
    return TopAttention(
        block.width,
        config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        dropout=config.dropout,
        legacy_ln_init=config.legacy_ln_init,
    )


def _build_bert_layer(config: Any, block: Block) -> TopBertLayer | None:
    if not block.last:
        return None
    return TopBertLayer(
        block.width,
        config.intermediate_size,
        num_heads=config.num_heads,
        dropout=config.dropout,
        legacy_ln_init=config.legacy_ln_init,
    )


def _prepare_attention(config: Any, blocks: list[Block], base_parameters: int) -> Any:
    _refuse_shared_blocks(blocks)
    _require_last(blocks)
    return config


def _prepare_bert_layer(config: Any, blocks: list[Block], base_parameters: int) -> Any:
    _refuse_shared_blocks(blocks)
    _require_last(blocks)
    if config.num_heads is None:
        width = blocks[0].width
        heads = width // 64 if width % 64 == 0 else next(n for n in range(12, 0, -1) if width % n == 0)
        config = replace_field(config, "num_heads", heads)
    for block in blocks:
        require_multiple("hidden_size", block.width, "num_heads", config.num_heads)
    if config.intermediate_size is None:
        config = replace_field(config, "intermediate_size", 4 * blocks[0].width)
    return config


_REASON = "it stands behind the last block, where the base model has no weights."

TOP_ATTENTION = Method(name="top_attention", build=_build_attention, prepare=_prepare_attention, unmergeable=_REASON)
TOP_BERT_LAYER = Method(
    name="top_bert_layer", build=_build_bert_layer, prepare=_prepare_bert_layer, unmergeable=_REASON
)
