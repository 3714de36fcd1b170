"""The options of the convolution, and how the host bindings build it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import integer, option, probability
from pal_adapters.hosts.method import Method, Options

from .layer import Neighbours


def _build(options: NeighboursOptions, block: Block) -> Neighbours:
    return Neighbours(block.width, options.hidden_size, dropout=options.dropout)


METHOD = Method(
    name="neighbours",
    build=_build,
    unmergeable="its convolution reads several tokens, which no weight of the base model can do.",
    fusable=True,
    attends=True,
)


@dataclass(eq=False)
class NeighboursOptions(Options):
    """The options of `NeighboursConfig` and `NeighboursPeftConfig`.

    Args:
        hidden_size: `r`.
        dropout: dropout probability behind the convolution.
    """

    method: ClassVar[Method] = METHOD

    hidden_size: int = field(default=8, metadata=option("Inner width.", integer(1)))
    dropout: float = field(default=0.1, metadata=option("Dropout probability.", probability()))
