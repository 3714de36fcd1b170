"""The convolution in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass

import pal_adapters
from pal_adapters.hosts.adapters.config import TaskAdapterConfig

from .config import NeighboursOptions


@dataclass(eq=False)
class NeighboursConfig(NeighboursOptions, TaskAdapterConfig):
    """A convolution over neighbouring tokens."""

    architecture: str | None = "neighbours"


pal_adapters.register_method(NeighboursConfig)
