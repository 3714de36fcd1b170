"""PALs in PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.layer import TaskTunerLayer
from pal_adapters.hosts.peft.tuner import TaskTuner, register

from .config import METHOD, validate


@dataclass
class PALPeftConfig(TaskPeftConfig):
    r"""Projected attention layers: `get_peft_model(model, PALPeftConfig(task_type="SEQ_CLS"))`.

    $$TS(x) = g(V^D \, SA(V^E x)), \qquad y = LN_2(h_1 + o_2 + TS(x))$$

    in parallel with each whole block, see `pal_adapters.methods.pal.layer.PAL`. Pre-LN blocks: `y = h_1 + o_2 +
    TS(N_1(x))`.

    Source: Stickland and Murray, "BERT and PALs", ICML 2019. Differs from the paper in: the base stays frozen unless
    `train_base=True`, and the module starts as the identity unless `init_weights=False`.

    Args:
        hidden_size: `r`; None takes 204 at width 768, 264 at 1024 and elsewhere the smallest multiple of `num_heads`
            with which eight tasks make the model 1.13 times as large. The number is stored with the adapter.
        num_heads: heads of the attention; must divide `hidden_size`.
        tie_projections: one `V^E`, `V^D` for all blocks of a stack, or own ones in each.
        dropout: on the attention probabilities.
        activation_site: GELU after `V^D` (`"output"`), before it (`"middle"`) or none (`"none"`).
        use_bias: biases in every linear.
        pal_input: what the module reads in pre-LN blocks, the normalised block input (`"norm"`) or the input as it is.
        lhuc: scale the term by `2 sigmoid(rho)`, `rho [d]`.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD

    hidden_size: int | None = field(default=None, metadata={"help": "Inner width; chosen from the model by default."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads."})
    tie_projections: bool = field(default=True, metadata={"help": "One pair of projections for all blocks."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout on the attention probabilities."})
    activation_site: str = field(default="output", metadata={"help": "'output', 'middle' or 'none'."})
    use_bias: bool = field(default=True, metadata={"help": "Biases in every linear."})
    pal_input: str = field(default="norm", metadata={"help": "'norm' or 'raw', in pre-LN blocks."})
    lhuc: bool = field(default=False, metadata={"help": "Scale the term by 2 sigmoid(rho)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)


class PALTunerLayer(TaskTunerLayer):
    """The PALs of one block."""

    method = METHOD


class PALModel(TaskTuner):
    """The tuner of PALs."""

    method = METHOD
    tuner_layer_cls = PALTunerLayer


register(METHOD, PALPeftConfig, PALModel)
