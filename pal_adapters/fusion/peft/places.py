"""The places at which the sources of a combination act, in PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pal_adapters.blocks.sites import Block
from pal_adapters.errors import UnsupportedError
from pal_adapters.fusion.units import Pair

from .layers import VALUE
from .parts import NormPart, UnitPart
from .sources import Source


@dataclass
class Place:
    """One module or block that sources adapt.

    Attributes:
        path: name of the module or block.
        kind: "module", "norm" or "block".
        width: `d`.
        block: the block, for task modules.
        parts: the weights of each source at this place.
    """

    path: str
    kind: str
    width: int
    block: Block | None = None
    parts: dict[str, Any] = field(default_factory=dict)

    def names(self, site: str) -> list[str]:
        """The sources that act at a site."""
        return [name for name, part in self.parts.items() if not isinstance(part, UnitPart) or site in part.unit.sites]

    @property
    def sites(self) -> list[str]:
        if self.kind != "block":
            return [VALUE]
        return list(dict.fromkeys(site for part in self.parts.values() for site in part.unit.sites))

    @property
    def label(self) -> str:
        """The kind of module, which is the same in every block."""
        if any(isinstance(part, Pair) and part.is_lora for part in self.parts.values()):
            return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", self.path)
        return f"width {self.width}"


def places_of(sources: Mapping[str, Source]) -> dict[str, Place]:
    """The places of all sources, by the name of the module or block.

    Raises:
        UnsupportedError: if two sources adapt the same module in different ways.
    """
    places: dict[str, Place] = {}
    for name, source in sources.items():
        for path, part in source.parts.items():
            if isinstance(part, UnitPart):
                kind, width, block = "block", part.block.width, part.block
            elif isinstance(part, NormPart):
                kind, width, block = "norm", next(iter(part.weights.values())).shape[0], None
            else:
                kind, width, block = "module", part.up.shape[0], None
            place = places.setdefault(path, Place(path, kind, width, block))
            if place.kind != kind:
                raise UnsupportedError(
                    f"source {name!r} adapts {path!r} as a {kind}, and another one as a {place.kind}: use sources of "
                    "one method."
                )
            place.parts[name] = part
    return places
