"""PALs in PEFT."""

from __future__ import annotations

from dataclasses import dataclass

from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.registration import register

from .config import PALOptions


@dataclass
class PALPeftConfig(PALOptions, TaskPeftConfig):
    """Projected attention layers: `get_peft_model(model, PALPeftConfig(task_type="SEQ_CLS"))`.

    Its options are those of `pal_adapters.methods.pal.config.PALOptions`, and those of every config,
    `pal_adapters.hosts.peft.config.TaskPeftConfig`.

    Args:
        init_weights: True (a new PAL adds nothing) or False (`N(0, 0.02^2)`, as the authors do).
    """


register(PALPeftConfig)
