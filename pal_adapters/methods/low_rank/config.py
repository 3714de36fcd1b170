"""What both hosts' low-rank configs have in common."""

from __future__ import annotations

from typing import Any

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import require_bool, require_int, require_one_of
from pal_adapters.hosts.method import Method
from pal_adapters.methods.pal.config import check_input

from .layer import LowRank


def validate(config: Any) -> None:
    """Check the fields of a low-rank config.

    Raises:
        ConfigError: names the argument, the value and what is allowed.
    """
    require_int("hidden_size", config.hidden_size, minimum=1)
    require_one_of("activation_site", config.activation_site, ("middle", "output", "none"))
    require_one_of("pal_input", config.pal_input, ("norm", "raw"))
    for name in ("use_bias", "lhuc"):
        require_bool(name, getattr(config, name))


def _build(config: Any, block: Block) -> LowRank:
    return LowRank(
        block.width,
        config.hidden_size,
        activation_site=config.activation_site,
        bias=config.use_bias,
        lhuc=config.lhuc,
        reads="raw" if config.pal_input == "raw" else "x",
    )


def _prepare(config: Any, blocks: list[Block], base_parameters: int) -> Any:
    check_input(config, blocks)
    return config


METHOD = Method(
    name="low_rank",
    build=_build,
    prepare=_prepare,
    unmergeable="its non-linearity is parallel to a whole block, which no weight of the base model is.",
)
