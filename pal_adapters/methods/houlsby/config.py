"""The options of the Houlsby family, and how the host bindings build it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import boolean, integer, number, one_of, option, optional, probability, require_multiple
from pal_adapters.errors import UnsupportedError
from pal_adapters.hosts.method import Method, Options
from pal_adapters.methods.shared import MOST_HEADS, choose_hidden_size
from pal_adapters.nn.bottleneck import Projections

from .layer import ACTIVATIONS, HoulsbyPAL, ParallelHoulsby


def _reject_lhuc(options: Any) -> None:
    if options.lhuc:
        raise UnsupportedError(
            "lhuc=True is not supported here: the released code then uses the first task's feed-forward bottleneck "
            "for every task. Use PALConfig(lhuc=True) or LowRankConfig(lhuc=True)."
        )


def _build_parallel(options: ParallelHoulsbyOptions, block: Block) -> ParallelHoulsby:
    return ParallelHoulsby(block.width, options.hidden_size)


def _build_houlsby_pal(options: HoulsbyPALOptions, block: Block) -> HoulsbyPAL:
    assert options.hidden_size is not None
    return HoulsbyPAL(
        block.width,
        options.hidden_size,
        options.bottleneck_size,
        num_heads=options.num_heads,
        dropout=options.dropout,
    )


def _build_projections(options: HoulsbyPALOptions, block: Block) -> nn.Module:
    assert options.hidden_size is not None
    return Projections(block.width, options.hidden_size)


PARALLEL_HOULSBY = Method(
    name="parallel_houlsby",
    build=_build_parallel,
    unmergeable="its bottlenecks are not linear, so no weight of the base model can take them up.",
)
HOULSBY_PAL = Method(
    name="houlsby_pal",
    build=_build_houlsby_pal,
    build_shared=_build_projections,
    prepare=choose_hidden_size,
    unmergeable="its bottlenecks are not linear and its PALs attend to other tokens.",
    attends=True,
)
HOULSBY = Method(
    name="houlsby",
    build=lambda options, block: None,  # in PEFT, its tuner adds bottlenecks to modules, not to blocks
    unmergeable="its bottlenecks are not linear, so no weight of the base model can take them up.",
)


@dataclass(eq=False)
class ParallelHoulsbyOptions(Options):
    r"""The options of `ParallelHoulsbyConfig` and `ParallelHoulsbyPeftConfig`.

    $$o_1' = o_1 + A(o_1), \qquad o_2' = o_2 + A'(h_1), \qquad A(u) = V^D g(V^E u)$$

    The Houlsby variant of the PALs paper: its second bottleneck is parallel to the feed-forward part. See
    `pal_adapters.methods.houlsby.layer.ParallelHoulsby`. The bottlenecks of Houlsby et al. themselves are
    `double_seq_bn` in adapters and `HoulsbyPeftConfig` in PEFT. Source: Stickland and Murray, "BERT and PALs", ICML
    2019.

    Args:
        hidden_size: `r`; with 50, eight tasks make the model 1.13 times as large.
        lhuc: must be False: the released code computes this combination incorrectly.

    Raises:
        ConfigError: for a value that is not allowed.
        UnsupportedError: for `lhuc=True`.
    """

    method: ClassVar[Method] = PARALLEL_HOULSBY

    hidden_size: int = field(default=50, metadata=option("Bottleneck size.", integer(1)))
    lhuc: bool = field(default=False, metadata=option("Must be False.", boolean()))

    def validate(self) -> None:
        _reject_lhuc(self)


@dataclass(eq=False)
class HoulsbyPALOptions(Options):
    r"""The options of `HoulsbyPALConfig` and `HoulsbyPALPeftConfig`.

    $$o_1' = o_1 + V^D g(V^E o_1), \qquad y = LN_2(h_1 + o_2 + PAL(h_1))$$

    A bottleneck after attention and a PAL parallel to the feed-forward part. See
    `pal_adapters.methods.houlsby.layer.HoulsbyPAL`. Source: Stickland and Murray, "BERT and PALs", ICML 2019.

    Args:
        hidden_size: `r` of the PAL; for None see `PALOptions`.
        bottleneck_size: size of the bottleneck after attention.
        num_heads: attention heads of the PAL; must divide `hidden_size`.
        dropout: dropout probability on the PAL's attention weights.
        lhuc: must be False: the released code fails with this combination.

    Raises:
        ConfigError: for a value that is not allowed.
        UnsupportedError: for `lhuc=True`.
    """

    method: ClassVar[Method] = HOULSBY_PAL

    hidden_size: int | None = field(default=156, metadata=option("Width of the PAL.", optional(integer(1))))
    bottleneck_size: int = field(default=50, metadata=option("Bottleneck size.", integer(1)))
    num_heads: int = field(default=6, metadata=option("Attention heads of the PAL.", integer(1, MOST_HEADS)))
    dropout: float = field(default=0.1, metadata=option("Dropout on the attention weights.", probability()))
    lhuc: bool = field(default=False, metadata=option("Must be False.", boolean()))

    def validate(self) -> None:
        if self.hidden_size is not None:
            require_multiple("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        _reject_lhuc(self)


@dataclass(eq=False)
class HoulsbyOptions(Options):
    r"""The options of `HoulsbyPeftConfig`.

    $$A(u) = u + W_2 \, g(W_1 u + b_1) + b_2, \qquad h_1 = LN_1(x + A_1(o_1)), \qquad y = LN_2(h_1 + A_2(o_2))$$

    sequential, after both branches of a block, before the residual sum. See
    `pal_adapters.methods.houlsby.layer.HoulsbyBottleneck`. The base model and its pooler stay frozen, but each
    adapter trains and saves its own copy of every layer norm.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019. Differences from the paper:
    `W_2` starts at zero unless `init_weights=False`; in models that apply dropout as a function (BART, and T5 except
    for its attention), the bottleneck comes before that dropout.

    Args:
        hidden_size: bottleneck size.
        activation: `"gelu_new"`, the tanh approximation of the reference code, or `"gelu"`, `"relu"`, `"silu"`,
            `"tanh"`.
        init_std: standard deviation of the truncated normal initialisation, 1e-2 in the paper.
        train_layernorm: train a copy of every layer norm; norms outside the blocks are included if all blocks are
            adapted.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = HOULSBY

    hidden_size: int = field(default=64, metadata=option("Bottleneck size.", integer(1)))
    activation: str = field(default="gelu_new", metadata=option("Activation function.", one_of(*ACTIVATIONS)))
    init_std: float = field(
        default=1e-2, metadata=option("Standard deviation of the initial weights.", number(0, 100, above=True))
    )
    train_layernorm: bool = field(default=True, metadata=option("Train a copy of every layer norm.", boolean()))
