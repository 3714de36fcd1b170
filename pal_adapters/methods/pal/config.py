"""The options of PALs, and how the host bindings build them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import boolean, integer, one_of, option, optional, probability, require_multiple
from pal_adapters.hosts.method import Method, Options
from pal_adapters.methods.shared import MOST_HEADS, check_pal_input, choose_hidden_size
from pal_adapters.nn.bottleneck import Projections

from .layer import PAL


def _build(options: PALOptions, block: Block) -> PAL:
    assert options.hidden_size is not None
    return PAL(
        block.width,
        options.hidden_size,
        num_heads=options.num_heads,
        dropout=options.dropout,
        activation_site=options.activation_site,  # type: ignore[arg-type]
        bias=options.use_bias,
        tied=options.tie_projections,
        lhuc=options.lhuc,
        reads="raw" if options.pal_input == "raw" else "x",
    )


def _build_shared(options: PALOptions, block: Block) -> nn.Module | None:
    if not options.tie_projections:
        return None
    assert options.hidden_size is not None
    return Projections(block.width, options.hidden_size, bias=options.use_bias)


def _prepare(options: PALOptions, blocks: list[Block], base_parameters: int) -> Mapping[str, Any]:
    check_pal_input(options.pal_input, blocks)
    return choose_hidden_size(options, blocks, base_parameters)


METHOD = Method(
    name="pal",
    build=_build,
    build_shared=_build_shared,
    prepare=_prepare,
    unmergeable="a PAL attends to other tokens, which no weight of the base model can do.",
    fusable=True,
    attends=True,
)


@dataclass(eq=False)
class PALOptions(Options):
    r"""The options of `PALConfig` and `PALPeftConfig`.

    $$TS(x) = g(V^D \, SA(V^E x)), \qquad y = LN_2(h_1 + o_2 + TS(x))$$

    in parallel with each block, where `SA` is multi-head self-attention of width `r`; pre-LN blocks:
    `y = h_1 + o_2 + TS(N_1(x))`. See `pal_adapters.methods.pal.layer.PAL`.

    Source: Stickland and Murray, "BERT and PALs", ICML 2019. Differences from the paper: the base model stays frozen
    unless `train_base=True`, and by default a new PAL adds nothing to the model's output.

    Args:
        hidden_size: `r`. None chooses 204 at width 768, 264 at width 1024, and otherwise the smallest multiple of
            `num_heads` with which eight tasks make the model 1.13 times as large. The chosen width is saved with the
            adapter.
        num_heads: attention heads; must divide `hidden_size`.
        tie_projections: share one `V^E` and one `V^D` across the blocks of a stack, instead of a pair in each block.
        dropout: dropout probability on the attention weights.
        activation_site: where the GELU is applied: after `V^D` (`"output"`), before it (`"middle"`) or nowhere
            (`"none"`).
        use_bias: whether the linear maps have biases.
        pal_input: what the module reads in pre-LN blocks: the normalised block input (`"norm"`) or the block input
            itself (`"raw"`).
        lhuc: scale the term by `2 sigmoid(rho)` with a learned `rho [d]`.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD

    hidden_size: int | None = field(
        default=None, metadata=option("Inner width; by default chosen for the model.", optional(integer(1)))
    )
    num_heads: int = field(default=6, metadata=option("Attention heads.", integer(1, MOST_HEADS)))
    tie_projections: bool = field(default=True, metadata=option("Share the projections across blocks.", boolean()))
    dropout: float = field(default=0.1, metadata=option("Dropout on the attention weights.", probability()))
    activation_site: str = field(
        default="output", metadata=option("Where the GELU is applied.", one_of("output", "middle", "none"))
    )
    use_bias: bool = field(default=True, metadata=option("Whether the linear maps have biases.", boolean()))
    pal_input: str = field(
        default="norm", metadata=option("What the module reads in pre-LN blocks.", one_of("norm", "raw"))
    )
    lhuc: bool = field(default=False, metadata=option("Scale the term by 2 sigmoid(rho).", boolean()))

    def validate(self) -> None:
        if self.hidden_size is not None:
            require_multiple("hidden_size", self.hidden_size, "num_heads", self.num_heads)
