"""The options of the modules on top of the last block, and how the host bindings build them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import boolean, integer, option, optional, probability, require_multiple
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.hosts.method import Method, Options
from pal_adapters.methods.shared import MOST_HEADS

from .layer import TopAttention, TopBertLayer


def _build_attention(options: TopAttentionOptions, block: Block) -> TopAttention | None:
    if not block.last:
        return None
    return TopAttention(
        block.width,
        options.hidden_size,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        dropout=options.dropout,
        legacy_ln_init=options.legacy_ln_init,
    )


def _build_bert_layer(options: TopBertLayerOptions, block: Block) -> TopBertLayer | None:
    if not block.last:
        return None
    assert options.intermediate_size is not None
    assert options.num_heads is not None
    return TopBertLayer(
        block.width,
        options.intermediate_size,
        num_heads=options.num_heads,
        dropout=options.dropout,
        legacy_ln_init=options.legacy_ln_init,
    )


def _check_blocks(blocks: list[Block]) -> None:
    if any(block.repeated for block in blocks):
        raise UnsupportedError(
            "a module on top of the last block cannot be added to a model that runs one block at several depths, such "
            "as ALBERT."
        )
    if not any(block.last for block in blocks):
        raise ConfigError(
            f"none of the chosen blocks ({', '.join(repr(block.name) for block in blocks)}) is the last of its stack, "
            "on top of which the module goes: include the last block, or select no blocks."
        )


def _prepare_attention(options: TopAttentionOptions, blocks: list[Block], base_parameters: int) -> Mapping[str, Any]:
    _check_blocks(blocks)
    return {}


def _prepare_bert_layer(options: TopBertLayerOptions, blocks: list[Block], base_parameters: int) -> Mapping[str, Any]:
    _check_blocks(blocks)
    width = blocks[0].width
    chosen: dict[str, Any] = {}
    heads = options.num_heads
    if heads is None:
        heads = width // 64 if width % 64 == 0 else next(n for n in range(12, 0, -1) if width % n == 0)
        chosen["num_heads"] = heads
    for block in blocks:
        require_multiple("hidden_size", block.width, "num_heads", heads)
    if options.intermediate_size is None:
        chosen["intermediate_size"] = 4 * width
    return chosen


_REASON = "it acts after the last block, where the base model has no weights."

TOP_ATTENTION = Method(
    name="top_attention",
    build=_build_attention,
    prepare=_prepare_attention,
    unmergeable=_REASON,
    identity=False,
    attends=True,
)
TOP_BERT_LAYER = Method(
    name="top_bert_layer",
    build=_build_bert_layer,
    prepare=_prepare_bert_layer,
    unmergeable=_REASON,
    identity=False,
    attends=True,
)


@dataclass(eq=False)
class TopAttentionOptions(Options):
    r"""The options of `TopAttentionConfig` and `TopAttentionPeftConfig`.

    $$u_0 = E y_L, \quad u_{i+1} = LN(u_i + W \, SA(u_i)), \quad y_L := D u_k$$

    replaces the output `y_L` of the stack. See `pal_adapters.methods.top.layer.TopAttention`. Source: Stickland and
    Murray, "BERT and PALs", ICML 2019.

    Args:
        hidden_size: `r`, 204 in the authors' config; `num_heads` must divide it.
        num_layers: `k`, the number of attention layers.
        num_heads: attention heads of each layer.
        dropout: dropout probability on the attention weights and on the output of each layer.
        legacy_ln_init: initialise the layer norms as the released code does, see `pal_adapters.methods.released`.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = TOP_ATTENTION

    hidden_size: int = field(default=204, metadata=option("Inner width.", integer(1)))
    num_layers: int = field(default=6, metadata=option("Attention layers.", integer(1, 1000)))
    num_heads: int = field(default=12, metadata=option("Attention heads.", integer(1, MOST_HEADS)))
    dropout: float = field(default=0.1, metadata=option("Dropout probability.", probability()))
    legacy_ln_init: bool = field(default=False, metadata=option("The authors' layer norm initialisation.", boolean()))

    def validate(self) -> None:
        require_multiple("hidden_size", self.hidden_size, "num_heads", self.num_heads)


@dataclass(eq=False)
class TopBertLayerOptions(Options):
    r"""The options of `TopBertLayerConfig` and `TopBertLayerPeftConfig`.

    $$h = LN(y_L + W \, SA(y_L)), \quad y_L := LN(h + W_2 g(W_1 h))$$

    replaces the output `y_L` of the stack. See `pal_adapters.methods.top.layer.TopBertLayer`. Source: Stickland and
    Murray, "BERT and PALs", ICML 2019.

    Args:
        intermediate_size: width of the feed-forward part; None takes four times the model's width.
        num_heads: attention heads; must divide the model's width. None takes one head per 64 channels, as in
            BERT, or if 64 does not divide the width, the largest number up to 12 that does.
        dropout: dropout probability on the attention weights and on both branches.
        legacy_ln_init: initialise the layer norms as the released code does, see `pal_adapters.methods.released`.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = TOP_BERT_LAYER

    intermediate_size: int | None = field(
        default=None, metadata=option("Width of the feed-forward part.", optional(integer(1)))
    )
    num_heads: int | None = field(
        default=None,
        metadata=option("Attention heads; by default chosen for the model.", optional(integer(1, MOST_HEADS))),
    )
    dropout: float = field(default=0.1, metadata=option("Dropout probability.", probability()))
    legacy_ln_init: bool = field(default=False, metadata=option("The authors' layer norm initialisation.", boolean()))
