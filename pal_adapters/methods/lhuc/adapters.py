"""LHUC in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.patches import register
from pal_adapters.hosts.method import Method

from .config import METHOD, validate


@dataclass(eq=False)
class LHUCConfig(TaskAdapterConfig):
    r"""One learned scale a channel: `model.add_adapter("rte", config=LHUCConfig())` or `"lhuc"`.

    $$y := 2 \, \mathrm{sigmoid}(\rho) \odot y$$

    with `rho [d]` for each block, see `pal_adapters.methods.lhuc.layer.LHUC`. Source: Stickland and Murray, ICML 2019.

    Args:
        lhuc_site: what is scaled: the block's output (`"output"`), the feed-forward output (`"ffn"`), or the
            first in post-LN and the second in pre-LN blocks (`"auto"`), where a scale on the residual stream
            would compound.
        init_weights: `"zero"` (`rho = 0`, nothing changes at start) or `"bert"` (`N(0, 0.02^2)`).

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD
    init_choices: ClassVar[tuple[str, ...]] = ("zero", "bert")
    fusable: ClassVar[bool] = False

    architecture: str | None = "lhuc"
    init_weights: str = "zero"
    lhuc_site: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)


register(LHUCConfig, {"lhuc": LHUCConfig()})
