"""Low-rank layers in PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.layer import TaskTunerLayer
from pal_adapters.hosts.peft.tuner import TaskTuner, register

from .config import METHOD, validate


@dataclass
class LowRankPeftConfig(TaskPeftConfig):
    r"""Low-rank layers, in parallel with each whole block: `get_peft_model(model,
    LowRankPeftConfig(task_type="SEQ_CLS"))`.

    $$TS(x) = V^D g(V^E x), \qquad y = LN_2(h_1 + o_2 + TS(x))$$

    Own projections in every block, see `pal_adapters.methods.low_rank.layer.LowRank`. Source: Stickland and Murray,
    ICML 2019.

    Args:
        hidden_size: `r`, 100 in the authors' configs.
        activation_site: GELU between the projections (`"middle"`), after them (`"output"`) or none
            (`"none"`).
        use_bias: biases in both.
        pal_input: what the module reads in pre-LN blocks, the normalised block input (`"norm"`) or the input
            as it is.
        lhuc: scale the term by `2 sigmoid(rho)`, `rho [d]`.
        init_weights: True (nothing changes at start) or False (`N(0, 0.02^2)`, the authors').

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD

    hidden_size: int = field(default=100, metadata={"help": "Inner width."})
    activation_site: str = field(default="middle", metadata={"help": "'middle', 'output' or 'none'."})
    use_bias: bool = field(default=True, metadata={"help": "Biases in both."})
    pal_input: str = field(default="norm", metadata={"help": "'norm' or 'raw', in pre-LN blocks."})
    lhuc: bool = field(default=False, metadata={"help": "Scale the term by 2 sigmoid(rho)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)


class LowRankTunerLayer(TaskTunerLayer):
    """Low-rank layers of one block."""

    method = METHOD


class LowRankModel(TaskTuner):
    """The tuner of low-rank layers."""

    method = METHOD
    tuner_layer_cls = LowRankTunerLayer


register(METHOD, LowRankPeftConfig, LowRankModel)
