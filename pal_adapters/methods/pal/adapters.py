"""PALs in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.registration import register

from .config import PALOptions


@dataclass(eq=False)
class PALConfig(PALOptions, TaskAdapterConfig):
    """Projected attention layers: `model.add_adapter("rte", config=PALConfig())`, `"pal"` or `"pal[num_heads=12]"`.

    Its options are those of `pal_adapters.methods.pal.config.PALOptions`, and those of every config,
    `pal_adapters.hosts.adapters.config.TaskAdapterConfig`.

    Args:
        init_weights: `"zero_decoder"` (a new PAL adds nothing) or `"bert"` (`N(0, 0.02^2)`, as the authors do).
    """

    architecture: str | None = "pal"


register(PALConfig)
