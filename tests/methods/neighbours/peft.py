"""The convolution in PEFT."""

from __future__ import annotations

from dataclasses import dataclass

import pal_adapters
from pal_adapters.hosts.peft.config import TaskPeftConfig

from .config import NeighboursOptions


@dataclass
class NeighboursPeftConfig(NeighboursOptions, TaskPeftConfig):
    """A convolution over neighbouring tokens."""


pal_adapters.register_method(NeighboursPeftConfig)
