"""The Houlsby variants of the PALs paper in PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.layer import TaskTunerLayer
from pal_adapters.hosts.peft.tuner import TaskTuner, register

from .config import HOULSBY_PAL, PARALLEL_HOULSBY, validate_houlsby_pal, validate_parallel


@dataclass
class ParallelHoulsbyPeftConfig(TaskPeftConfig):
    r"""The Houlsby variant of the PALs paper: `get_peft_model(model, ParallelHoulsbyPeftConfig(task_type="SEQ_CLS"))`.

    $$o_1' = o_1 + A(o_1), \qquad o_2' = o_2 + A'(h_1), \qquad A(u) = V^D g(V^E u)$$

    The second bottleneck is parallel to the feed-forward part, see
    `pal_adapters.methods.houlsby.layer.ParallelHoulsby`. The
    bottlenecks of Houlsby et al. themselves are `double_seq_bn` in adapters and `HoulsbyPeftConfig` in PEFT. Source:
    Stickland and Murray, ICML 2019.

    Args:
        hidden_size: `r`, 50 for 1.13 times the model with eight tasks.
        lhuc: not allowed: the published code computes this combination wrongly.
        init_weights: True (nothing changes at start) or False (`N(0, 0.02^2)`, the authors').

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = PARALLEL_HOULSBY

    hidden_size: int = field(default=50, metadata={"help": "Bottleneck width."})
    lhuc: bool = field(default=False, metadata={"help": "Not allowed with this method."})

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_parallel(self)


class ParallelHoulsbyTunerLayer(TaskTunerLayer):
    """Parallel bottlenecks of one block."""

    method = PARALLEL_HOULSBY


class ParallelHoulsbyModel(TaskTuner):
    """The tuner of parallel bottlenecks."""

    method = PARALLEL_HOULSBY
    tuner_layer_cls = ParallelHoulsbyTunerLayer


@dataclass
class HoulsbyPALPeftConfig(TaskPeftConfig):
    r"""A bottleneck behind attention and a PAL beside the feed-forward part: `get_peft_model(model,
    HoulsbyPALPeftConfig(task_type="SEQ_CLS"))`.

    $$o_1' = o_1 + V^D g(V^E o_1), \qquad y = LN_2(h_1 + o_2 + PAL(h_1))$$

    See `pal_adapters.methods.houlsby.layer.HoulsbyPAL`. Source: Stickland and Murray, ICML 2019.

    Args:
        hidden_size: `r` of the PAL; None as for PALs.
        bottleneck_size: `m` of the bottleneck behind attention.
        num_heads: heads of the PAL; must divide `hidden_size`.
        dropout: on the PAL's attention probabilities.
        lhuc: not allowed: the published code fails with this combination.
        init_weights: True (nothing changes at start) or False (`N(0, 0.02^2)`, the authors').

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = HOULSBY_PAL

    hidden_size: int | None = field(default=156, metadata={"help": "Width of the PAL."})
    bottleneck_size: int = field(default=50, metadata={"help": "Bottleneck width."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads of the PAL."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout on the attention probabilities."})
    lhuc: bool = field(default=False, metadata={"help": "Not allowed with this method."})

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_houlsby_pal(self)


class HoulsbyPALTunerLayer(TaskTunerLayer):
    """Bottlenecks and PALs of one block."""

    method = HOULSBY_PAL


class HoulsbyPALModel(TaskTuner):
    """The tuner of bottlenecks and PALs."""

    method = HOULSBY_PAL
    tuner_layer_cls = HoulsbyPALTunerLayer


register(PARALLEL_HOULSBY, ParallelHoulsbyPeftConfig, ParallelHoulsbyModel)
register(HOULSBY_PAL, HoulsbyPALPeftConfig, HoulsbyPALModel)
