"""What both hosts' LHUC configs have in common."""

from __future__ import annotations

from typing import Any

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import require_one_of
from pal_adapters.hosts.method import Method

from .layer import LHUC


def validate(config: Any) -> None:
    """Check the fields of an LHUC config.

    Raises:
        ConfigError: names the argument, the value and what is allowed.
    """
    require_one_of("lhuc_site", config.lhuc_site, ("auto", "output", "ffn"))


def _build(config: Any, block: Block) -> LHUC:
    site = config.lhuc_site
    if site == "auto":
        site = "output" if block.sites.norm == "post" else "ffn"
    return LHUC(block.width, site=site)


METHOD = Method(
    name="lhuc",
    build=_build,
    unmergeable="its scale belongs to one task, and the norm that would take it up serves the base model too.",
)
