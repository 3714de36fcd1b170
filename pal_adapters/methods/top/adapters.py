"""Modules on top of the last block in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.patches import register
from pal_adapters.hosts.method import Method

from .config import TOP_ATTENTION, TOP_BERT_LAYER, validate_attention, validate_bert_layer


@dataclass(eq=False)
class TopAttentionConfig(TaskAdapterConfig):
    r"""Attention of a small width on top of the last block: `model.add_adapter("rte", config=TopAttentionConfig())`
    or `"top_attention"`.

    $$u_0 = E y_L, \quad u_{i+1} = LN(u_i + W \, SA(u_i)), \quad y_L := D u_k$$

    Replaces the output of the stack, see `pal_adapters.methods.top.layer.TopAttention`. Source: Stickland and Murray,
    ICML 2019.

    Args:
        hidden_size: `r`, 204 in the authors' config; `num_heads` must divide it.
        num_layers: attention layers in the stack.
        num_heads: heads of each layer.
        dropout: on the attention probabilities and on each layer's output.
        legacy_ln_init: draw the layer norms from `N(0, 0.02^2)` as the authors' code does, instead of 1 and
            0.
        init_weights: `"bert"` (`N(0, 0.02^2)`); the module replaces its input and has no identity.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = TOP_ATTENTION
    init_choices: ClassVar[tuple[str, ...]] = ("bert",)
    fusable: ClassVar[bool] = False

    architecture: str | None = "top_attention"
    init_weights: str = "bert"
    hidden_size: int = 204
    num_layers: int = 6
    num_heads: int = 12
    dropout: float = 0.1
    legacy_ln_init: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_attention(self)


@dataclass(eq=False)
class TopBertLayerConfig(TaskAdapterConfig):
    r"""A whole BERT block on top of the last block: `model.add_adapter("rte", config=TopBertLayerConfig())` or
    `"top_bert_layer"`.

    $$h = LN(y_L + W \, SA(y_L)), \quad y_L := LN(h + W_2 g(W_1 h))$$

    See `pal_adapters.methods.top.layer.TopBertLayer`. Source: Stickland and Murray, ICML 2019.

    Args:
        intermediate_size: width of the feed-forward part; None takes four times the model's width.
        num_heads: heads; must divide the model's width. None takes one for 64 channels as BERT does (12 at 768), or
            where 64 does not divide the width, the largest number up to 12 that does.
        dropout: on the attention probabilities and on both branches.
        legacy_ln_init: draw the layer norms from `N(0, 0.02^2)` as the authors' code does, instead of 1 and
            0.
        init_weights: `"bert"` (`N(0, 0.02^2)`); the module replaces its input and has no identity.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = TOP_BERT_LAYER
    init_choices: ClassVar[tuple[str, ...]] = ("bert",)
    fusable: ClassVar[bool] = False

    architecture: str | None = "top_bert_layer"
    init_weights: str = "bert"
    intermediate_size: int | None = None
    num_heads: int | None = None
    dropout: float = 0.1
    legacy_ln_init: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_bert_layer(self)


register(TopAttentionConfig, {"top_attention": TopAttentionConfig()})
register(TopBertLayerConfig, {"top_bert_layer": TopBertLayerConfig()})
