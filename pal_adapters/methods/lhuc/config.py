"""The options of LHUC, and how the host bindings build it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import one_of, option
from pal_adapters.hosts.method import Method, Options

from .layer import LHUC


def _build(options: LHUCOptions, block: Block) -> LHUC:
    if options.lhuc_site == "auto":
        return LHUC(block.width, site="output" if block.sites.norm == "post" else "ffn")
    return LHUC(block.width, site=options.lhuc_site)  # type: ignore[arg-type]


METHOD = Method(
    name="lhuc",
    build=_build,
    unmergeable="the norm that could absorb its scale also serves the base model and other tasks.",
)


@dataclass(eq=False)
class LHUCOptions(Options):
    r"""The options of `LHUCConfig` and `LHUCPeftConfig`.

    $$y := 2 \, \mathrm{sigmoid}(\rho) \odot y$$

    with a learned `rho [d]` in each block. See `pal_adapters.methods.lhuc.layer.LHUC`. Source: Swietojanski and
    Renals, 2014, as used by Stickland and Murray, "BERT and PALs", ICML 2019.

    Args:
        lhuc_site: what is scaled: the block's output (`"output"`) or the feed-forward output (`"ffn"`). `"auto"` takes
            the former in post-LN blocks and the latter in pre-LN blocks, where scales on the residual stream would
            accumulate from block to block.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD

    lhuc_site: str = field(default="auto", metadata=option("What is scaled.", one_of("auto", "output", "ffn")))
