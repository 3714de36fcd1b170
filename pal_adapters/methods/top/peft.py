"""Modules on top of the last block in PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.layer import TaskTunerLayer
from pal_adapters.hosts.peft.tuner import TaskTuner, register

from .config import TOP_ATTENTION, TOP_BERT_LAYER, no_identity, validate_attention, validate_bert_layer


@dataclass
class TopAttentionPeftConfig(TaskPeftConfig):
    r"""Attention of a small width on top of the last block: `get_peft_model(model,
    TopAttentionPeftConfig(task_type="SEQ_CLS"))`.

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
        init_weights: False (`N(0, 0.02^2)`); the module replaces its input and has no identity.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = TOP_ATTENTION

    init_weights: bool = field(default=False, metadata={"help": "There is no identity initialisation."})
    hidden_size: int = field(default=204, metadata={"help": "Inner width."})
    num_layers: int = field(default=6, metadata={"help": "Attention layers."})
    num_heads: int = field(default=12, metadata={"help": "Attention heads."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout."})
    legacy_ln_init: bool = field(default=False, metadata={"help": "The authors' layer norm initialisation."})

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_attention(self)
        no_identity(self)


class TopAttentionTunerLayer(TaskTunerLayer):
    """Attention on top of one block."""

    method = TOP_ATTENTION


class TopAttentionModel(TaskTuner):
    """The tuner of attention on top."""

    method = TOP_ATTENTION
    tuner_layer_cls = TopAttentionTunerLayer


@dataclass
class TopBertLayerPeftConfig(TaskPeftConfig):
    r"""A whole BERT block on top of the last block: `get_peft_model(model,
    TopBertLayerPeftConfig(task_type="SEQ_CLS"))`.

    $$h = LN(y_L + W \, SA(y_L)), \quad y_L := LN(h + W_2 g(W_1 h))$$

    See `pal_adapters.methods.top.layer.TopBertLayer`. Source: Stickland and Murray, ICML 2019.

    Args:
        intermediate_size: width of the feed-forward part; None takes four times the model's width.
        num_heads: heads; must divide the model's width. None takes one for 64 channels as BERT does (12 at 768), or
            where 64 does not divide the width, the largest number up to 12 that does.
        dropout: on the attention probabilities and on both branches.
        legacy_ln_init: draw the layer norms from `N(0, 0.02^2)` as the authors' code does, instead of 1 and
            0.
        init_weights: False (`N(0, 0.02^2)`); the module replaces its input and has no identity.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = TOP_BERT_LAYER

    init_weights: bool = field(default=False, metadata={"help": "There is no identity initialisation."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the feed-forward part."})
    num_heads: int | None = field(default=None, metadata={"help": "Attention heads; by the model's width if None."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout."})
    legacy_ln_init: bool = field(default=False, metadata={"help": "The authors' layer norm initialisation."})

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_bert_layer(self)
        no_identity(self)


class TopBertLayerTunerLayer(TaskTunerLayer):
    """BERT blocks on top of one block."""

    method = TOP_BERT_LAYER


class TopBertLayerModel(TaskTuner):
    """The tuner of BERT blocks on top."""

    method = TOP_BERT_LAYER
    tuner_layer_cls = TopBertLayerTunerLayer


register(TOP_ATTENTION, TopAttentionPeftConfig, TopAttentionModel)
register(TOP_BERT_LAYER, TopBertLayerPeftConfig, TopBertLayerModel)
