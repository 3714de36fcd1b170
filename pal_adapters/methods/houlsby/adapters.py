"""The Houlsby variants of the PALs paper in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.registration import register

from .config import HoulsbyPALOptions, ParallelHoulsbyOptions


@dataclass(eq=False)
class ParallelHoulsbyConfig(ParallelHoulsbyOptions, TaskAdapterConfig):
    """The Houlsby variant of the PALs paper: `model.add_adapter("rte", config=ParallelHoulsbyConfig())` or
    `"parallel_houlsby"`.

    Its options are those of `pal_adapters.methods.houlsby.config.ParallelHoulsbyOptions`, and those of every config,
    `pal_adapters.hosts.adapters.config.TaskAdapterConfig`.

    Args:
        init_weights: `"zero_decoder"` (a new adapter changes nothing) or `"bert"` (`N(0, 0.02^2)`, as the authors do).
    """

    architecture: str | None = "parallel_houlsby"


@dataclass(eq=False)
class HoulsbyPALConfig(HoulsbyPALOptions, TaskAdapterConfig):
    """A bottleneck after attention and a PAL parallel to the feed-forward part: `model.add_adapter("rte",
    config=HoulsbyPALConfig())` or `"houlsby_pal"`.

    Its options are those of `pal_adapters.methods.houlsby.config.HoulsbyPALOptions`, and those of every config,
    `pal_adapters.hosts.adapters.config.TaskAdapterConfig`.

    Args:
        init_weights: `"zero_decoder"` (a new adapter changes nothing) or `"bert"` (`N(0, 0.02^2)`, as the authors do).
    """

    architecture: str | None = "houlsby_pal"


register(ParallelHoulsbyConfig)
register(HoulsbyPALConfig)
