"""LHUC in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.registration import register

from .config import LHUCOptions


@dataclass(eq=False)
class LHUCConfig(LHUCOptions, TaskAdapterConfig):
    """One learned scale for each channel: `model.add_adapter("rte", config=LHUCConfig())` or `"lhuc"`.

    Its options are those of `pal_adapters.methods.lhuc.config.LHUCOptions`, and those of every config,
    `pal_adapters.hosts.adapters.config.TaskAdapterConfig`.

    Args:
        init_weights: `"zero"` (`rho = 0`, which changes nothing) or `"bert"` (`N(0, 0.02^2)`).
    """

    init_choices: ClassVar[tuple[str, ...]] = ("zero", "bert")

    architecture: str | None = "lhuc"
    init_weights: str = "zero"


register(LHUCConfig)
