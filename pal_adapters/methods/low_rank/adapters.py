"""Low-rank layers in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.patches import register
from pal_adapters.hosts.method import Method

from .config import METHOD, validate


@dataclass(eq=False)
class LowRankConfig(TaskAdapterConfig):
    r"""Low-rank layers, in parallel with each whole block: `model.add_adapter("rte", config=LowRankConfig())` or
    `"low_rank"`.

    $$TS(x) = V^D g(V^E x), \qquad y = LN_2(h_1 + o_2 + TS(x))$$

    Own projections in every block, see `pal_adapters.methods.low_rank.layer.LowRank`. Source: Stickland and Murray,
    ICML 2019.

    Args:
        hidden_size: `r`, 100 in the authors' configs.
        activation_site: GELU between the projections (`"middle"`), after them (`"output"`) or none
            (`"none"`).
        use_bias: biases in both.
        pal_input: what the module reads in pre-LN blocks, the normalised block input (`"norm"`) or the input
            as it is.
        lhuc: scale the term by `2 sigmoid(rho)`, `rho [d]`.
        init_weights: `"zero_decoder"` (nothing changes at start) or `"bert"` (`N(0, 0.02^2)`, the authors').

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD

    architecture: str | None = "low_rank"
    hidden_size: int = 100
    activation_site: str = "middle"
    use_bias: bool = True
    pal_input: str = "norm"
    lhuc: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)


register(LowRankConfig, {"low_rank": LowRankConfig()})
