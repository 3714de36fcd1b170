"""The options of low-rank layers, and how the host bindings build them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import boolean, integer, one_of, option
from pal_adapters.hosts.method import Method, Options
from pal_adapters.methods.shared import check_pal_input

from .layer import LowRank


def _build(options: LowRankOptions, block: Block) -> LowRank:
    return LowRank(
        block.width,
        options.hidden_size,
        activation_site=options.activation_site,  # type: ignore[arg-type]
        bias=options.use_bias,
        lhuc=options.lhuc,
        reads="raw" if options.pal_input == "raw" else "x",
    )


def _prepare(options: LowRankOptions, blocks: list[Block], base_parameters: int) -> Mapping[str, Any]:
    check_pal_input(options.pal_input, blocks)
    return {}


METHOD = Method(
    name="low_rank",
    build=_build,
    prepare=_prepare,
    unmergeable="it has a non-linearity parallel to a whole block, where the base model has no weights.",
    fusable=True,
)


@dataclass(eq=False)
class LowRankOptions(Options):
    r"""The options of `LowRankConfig` and `LowRankPeftConfig`.

    $$TS(x) = V^D g(V^E x), \qquad y = LN_2(h_1 + o_2 + TS(x))$$

    in parallel with each block; every block has its own projections. See
    `pal_adapters.methods.low_rank.layer.LowRank`. Source: Stickland and Murray, "BERT and PALs", ICML 2019.

    Args:
        hidden_size: `r`, 100 in the authors' configs.
        activation_site: where the GELU is applied: between the projections (`"middle"`), after them (`"output"`) or
            nowhere (`"none"`).
        use_bias: whether the projections have biases.
        pal_input: what the module reads in pre-LN blocks: the normalised block input (`"norm"`) or the block input
            itself (`"raw"`).
        lhuc: scale the term by `2 sigmoid(rho)` with a learned `rho [d]`.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD

    hidden_size: int = field(default=100, metadata=option("Inner width.", integer(1)))
    activation_site: str = field(
        default="middle", metadata=option("Where the GELU is applied.", one_of("middle", "output", "none"))
    )
    use_bias: bool = field(default=True, metadata=option("Whether the projections have biases.", boolean()))
    pal_input: str = field(
        default="norm", metadata=option("What the module reads in pre-LN blocks.", one_of("norm", "raw"))
    )
    lhuc: bool = field(default=False, metadata=option("Scale the term by 2 sigmoid(rho).", boolean()))
