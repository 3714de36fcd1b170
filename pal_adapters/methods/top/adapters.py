"""Modules on top of the last block in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.registration import register

from .config import TopAttentionOptions, TopBertLayerOptions


@dataclass(eq=False)
class TopAttentionConfig(TopAttentionOptions, TaskAdapterConfig):
    """Narrow attention on top of the last block: `model.add_adapter("rte", config=TopAttentionConfig())` or
    `"top_attention"`.

    Its options are those of `pal_adapters.methods.top.config.TopAttentionOptions`, and those of every config,
    `pal_adapters.hosts.adapters.config.TaskAdapterConfig`.

    Args:
        init_weights: `"bert"` (`N(0, 0.02^2)`); a module that replaces its input has no identity initialisation.
    """

    init_choices: ClassVar[tuple[str, ...]] = ("bert",)

    architecture: str | None = "top_attention"
    init_weights: str = "bert"


@dataclass(eq=False)
class TopBertLayerConfig(TopBertLayerOptions, TaskAdapterConfig):
    """A whole BERT layer on top of the last block: `model.add_adapter("rte", config=TopBertLayerConfig())` or
    `"top_bert_layer"`.

    Its options are those of `pal_adapters.methods.top.config.TopBertLayerOptions`, and those of every config,
    `pal_adapters.hosts.adapters.config.TaskAdapterConfig`.

    Args:
        init_weights: `"bert"` (`N(0, 0.02^2)`); a module that replaces its input has no identity initialisation.
    """

    init_choices: ClassVar[tuple[str, ...]] = ("bert",)

    architecture: str | None = "top_bert_layer"
    init_weights: str = "bert"


register(TopAttentionConfig)
register(TopBertLayerConfig)
