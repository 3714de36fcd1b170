"""Low-rank layers in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.registration import register

from .config import LowRankOptions


@dataclass(eq=False)
class LowRankConfig(LowRankOptions, TaskAdapterConfig):
    """Low-rank layers: `model.add_adapter("rte", config=LowRankConfig())` or `"low_rank"`.

    Its options are those of `pal_adapters.methods.low_rank.config.LowRankOptions`, and those of every config,
    `pal_adapters.hosts.adapters.config.TaskAdapterConfig`.

    Args:
        init_weights: `"zero_decoder"` (a new layer adds nothing) or `"bert"` (`N(0, 0.02^2)`, as the authors do).
    """

    architecture: str | None = "low_rank"


register(LowRankConfig)
