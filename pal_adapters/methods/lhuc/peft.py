"""LHUC in PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.layer import TaskTunerLayer
from pal_adapters.hosts.peft.tuner import TaskTuner, register

from .config import METHOD, validate


@dataclass
class LHUCPeftConfig(TaskPeftConfig):
    r"""One learned scale a channel: `get_peft_model(model, LHUCPeftConfig(task_type="SEQ_CLS"))`.

    $$y := 2 \, \mathrm{sigmoid}(\rho) \odot y$$

    with `rho [d]` for each block, see `pal_adapters.methods.lhuc.layer.LHUC`. Source: Stickland and Murray, ICML 2019.

    Args:
        lhuc_site: what is scaled: the block's output (`"output"`), the feed-forward output (`"ffn"`), or the
            first in post-LN and the second in pre-LN blocks (`"auto"`), where a scale on the residual stream
            would compound.
        init_weights: True (`rho = 0`, nothing changes at start) or False (`N(0, 0.02^2)`).

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD

    lhuc_site: str = field(default="auto", metadata={"help": "'auto', 'output' or 'ffn'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)


class LHUCTunerLayer(TaskTunerLayer):
    """LHUC scales of one block."""

    method = METHOD


class LHUCModel(TaskTuner):
    """The tuner of LHUC scales."""

    method = METHOD
    tuner_layer_cls = LHUCTunerLayer


register(METHOD, LHUCPeftConfig, LHUCModel)
