"""Modules on top of the last block in PEFT."""

from __future__ import annotations

from dataclasses import dataclass

from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.registration import register

from .config import TopAttentionOptions, TopBertLayerOptions


@dataclass
class TopAttentionPeftConfig(TopAttentionOptions, TaskPeftConfig):
    """Narrow attention on top of the last block: `get_peft_model(model,
    TopAttentionPeftConfig(task_type="SEQ_CLS"))`.

    Its options are those of `pal_adapters.methods.top.config.TopAttentionOptions`, and those of every config,
    `pal_adapters.hosts.peft.config.TaskPeftConfig`.

    Args:
        init_weights: False (`N(0, 0.02^2)`); a module that replaces its input has no identity initialisation.
    """

    init_weights: bool = False


@dataclass
class TopBertLayerPeftConfig(TopBertLayerOptions, TaskPeftConfig):
    """A whole BERT layer on top of the last block: `get_peft_model(model,
    TopBertLayerPeftConfig(task_type="SEQ_CLS"))`.

    Its options are those of `pal_adapters.methods.top.config.TopBertLayerOptions`, and those of every config,
    `pal_adapters.hosts.peft.config.TaskPeftConfig`.

    Args:
        init_weights: False (`N(0, 0.02^2)`); a module that replaces its input has no identity initialisation.
    """

    init_weights: bool = False


register(TopAttentionPeftConfig)
register(TopBertLayerPeftConfig)
