"""PALs in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.patches import register
from pal_adapters.hosts.method import Method

from .config import METHOD, validate


@dataclass(eq=False)
class PALConfig(TaskAdapterConfig):
    r"""Projected attention layers: `model.add_adapter("rte", config=PALConfig())`, or `"pal"`, `"pal[num_heads=12]"`.

    $$TS(x) = g(V^D \, SA(V^E x)), \qquad y = LN_2(h_1 + o_2 + TS(x))$$

    in parallel with each whole block, see `pal_adapters.methods.pal.layer.PAL`. Pre-LN blocks: `y = h_1 + o_2 +
    TS(N_1(x))`.

    Source: Stickland and Murray, "BERT and PALs", ICML 2019. Differs from the paper in: the base stays frozen unless
    `train_base=True`, and the module starts as the identity unless `init_weights="bert"`.

    Args:
        hidden_size: `r`; None takes 204 at width 768, 264 at 1024 and elsewhere the smallest multiple of `num_heads`
            with which eight tasks make the model 1.13 times as large. The number is stored with the adapter.
        num_heads: heads of the attention; must divide `hidden_size`.
        tie_projections: one `V^E`, `V^D` for all blocks of a stack, or own ones in each.
        dropout: on the attention probabilities.
        activation_site: GELU after `V^D` (`"output"`), before it (`"middle"`) or none (`"none"`).
        use_bias: biases in every linear.
        pal_input: what the module reads in pre-LN blocks, the normalised block input (`"norm"`) or the input as it is.
        lhuc: scale the term by `2 sigmoid(rho)`, `rho [d]`.
        init_weights: `"zero_decoder"` (nothing changes at start) or `"bert"` (`N(0, 0.02^2)`, the authors').

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD

    architecture: str | None = "pal"
    hidden_size: int | None = None
    num_heads: int = 6
    tie_projections: bool = True
    dropout: float = 0.1
    activation_site: str = "output"
    use_bias: bool = True
    pal_input: str = "norm"
    lhuc: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)


register(PALConfig, {"pal": PALConfig()})
