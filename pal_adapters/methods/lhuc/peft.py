"""LHUC in PEFT."""

from __future__ import annotations

from dataclasses import dataclass

from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.registration import register

from .config import LHUCOptions


@dataclass
class LHUCPeftConfig(LHUCOptions, TaskPeftConfig):
    """One learned scale for each channel: `get_peft_model(model, LHUCPeftConfig(task_type="SEQ_CLS"))`.

    Its options are those of `pal_adapters.methods.lhuc.config.LHUCOptions`, and those of every config,
    `pal_adapters.hosts.peft.config.TaskPeftConfig`.

    Args:
        init_weights: True (`rho = 0`, which changes nothing) or False (`N(0, 0.02^2)`).
    """


register(LHUCPeftConfig)
