"""Low-rank layers in PEFT."""

from __future__ import annotations

from dataclasses import dataclass

from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.registration import register

from .config import LowRankOptions


@dataclass
class LowRankPeftConfig(LowRankOptions, TaskPeftConfig):
    """Low-rank layers: `get_peft_model(model, LowRankPeftConfig(task_type="SEQ_CLS"))`.

    Its options are those of `pal_adapters.methods.low_rank.config.LowRankOptions`, and those of every config,
    `pal_adapters.hosts.peft.config.TaskPeftConfig`.

    Args:
        init_weights: True (a new layer adds nothing) or False (`N(0, 0.02^2)`, as the authors do).
    """


register(LowRankPeftConfig)
