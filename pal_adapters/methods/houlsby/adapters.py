"""The Houlsby variants of the PALs paper in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.patches import register
from pal_adapters.hosts.method import Method

from .config import HOULSBY_PAL, PARALLEL_HOULSBY, validate_houlsby_pal, validate_parallel


@dataclass(eq=False)
class ParallelHoulsbyConfig(TaskAdapterConfig):
    r"""The Houlsby variant of the PALs paper: `model.add_adapter("rte", config=ParallelHoulsbyConfig())` or
    `"parallel_houlsby"`.

    $$o_1' = o_1 + A(o_1), \qquad o_2' = o_2 + A'(h_1), \qquad A(u) = V^D g(V^E u)$$

    The second bottleneck is parallel to the feed-forward part, see
    `pal_adapters.methods.houlsby.layer.ParallelHoulsby`. The
    bottlenecks of Houlsby et al. themselves are `double_seq_bn` in adapters and `HoulsbyPeftConfig` in PEFT. Source:
    Stickland and Murray, ICML 2019.

    Args:
        hidden_size: `r`, 50 for 1.13 times the model with eight tasks.
        lhuc: not allowed: the published code computes this combination wrongly.
        init_weights: `"zero_decoder"` (nothing changes at start) or `"bert"` (`N(0, 0.02^2)`, the authors').

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = PARALLEL_HOULSBY
    fusable: ClassVar[bool] = False

    architecture: str | None = "parallel_houlsby"
    hidden_size: int = 50
    lhuc: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_parallel(self)


@dataclass(eq=False)
class HoulsbyPALConfig(TaskAdapterConfig):
    r"""A bottleneck behind attention and a PAL beside the feed-forward part: `model.add_adapter("rte",
    config=HoulsbyPALConfig())` or `"houlsby_pal"`.

    $$o_1' = o_1 + V^D g(V^E o_1), \qquad y = LN_2(h_1 + o_2 + PAL(h_1))$$

    See `pal_adapters.methods.houlsby.layer.HoulsbyPAL`. Source: Stickland and Murray, ICML 2019.

    Args:
        hidden_size: `r` of the PAL; None as for PALs.
        bottleneck_size: `m` of the bottleneck behind attention.
        num_heads: heads of the PAL; must divide `hidden_size`.
        dropout: on the PAL's attention probabilities.
        lhuc: not allowed: the published code fails with this combination.
        init_weights: `"zero_decoder"` (nothing changes at start) or `"bert"` (`N(0, 0.02^2)`, the authors').

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = HOULSBY_PAL
    fusable: ClassVar[bool] = False

    architecture: str | None = "houlsby_pal"
    hidden_size: int | None = 156
    bottleneck_size: int = 50
    num_heads: int = 6
    dropout: float = 0.1
    lhuc: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_houlsby_pal(self)


register(ParallelHoulsbyConfig, {"parallel_houlsby": ParallelHoulsbyConfig()})
register(HoulsbyPALConfig, {"houlsby_pal": HoulsbyPALConfig()})
