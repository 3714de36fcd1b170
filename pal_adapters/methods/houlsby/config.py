"""What both hosts' configs of the Houlsby family have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import require_bool, require_int, require_multiple, require_one_of, require_probability
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.hosts.method import Method
from pal_adapters.methods.pal.config import with_hidden_size
from pal_adapters.methods.pal.layer import Projections

from .layer import ACTIVATIONS, HoulsbyPAL, ParallelHoulsby


def _forbid_lhuc(config: Any) -> None:
    if config.lhuc:
        raise UnsupportedError(
            "lhuc=True is not allowed here: the published code then uses the feed-forward bottleneck of the "
            "first task for "
            "every task. Use PALConfig(lhuc=True) or LowRankConfig(lhuc=True)."
        )


def validate_parallel(config: Any) -> None:
    """Check the fields of a config of the paper's Houlsby variant.

    Raises:
        ConfigError: names the argument, the value and what is allowed.
        UnsupportedError: for LHUC together with it.
    """
    require_int("hidden_size", config.hidden_size, minimum=1)
    require_bool("lhuc", config.lhuc)
    _forbid_lhuc(config)


def validate_houlsby_pal(config: Any) -> None:
    """Check the fields of a config of Houlsby with PALs.

    Raises:
        ConfigError: names the argument, the value and what is allowed.
        UnsupportedError: for LHUC together with it.
    """
    require_int("num_heads", config.num_heads, minimum=1)
    require_int("bottleneck_size", config.bottleneck_size, minimum=1)
    if config.hidden_size is not None:
        require_int("hidden_size", config.hidden_size, minimum=1)
        require_multiple("hidden_size", config.hidden_size, "num_heads", config.num_heads)
    require_probability("dropout", config.dropout)
    require_bool("lhuc", config.lhuc)
    _forbid_lhuc(config)


def validate_houlsby(config: Any) -> None:
    """Check the fields of a Houlsby config.

    Raises:
        ConfigError: names the argument, the value and what is allowed.
    """
    require_int("hidden_size", config.hidden_size, minimum=1)
    require_one_of("activation", config.activation, tuple(ACTIVATIONS))
    require_bool("train_layernorm", config.train_layernorm)
    if isinstance(config.init_std, bool) or not isinstance(config.init_std, float) or config.init_std <= 0:
        raise ConfigError(f"init_std={config.init_std!r} is not allowed: use a positive float, such as 1e-2.")


def _build_parallel(config: Any, block: Block) -> ParallelHoulsby:
    return ParallelHoulsby(block.width, config.hidden_size)


def _build_houlsby_pal(config: Any, block: Block) -> HoulsbyPAL:
    return HoulsbyPAL(
        block.width, config.hidden_size, config.bottleneck_size, num_heads=config.num_heads, dropout=config.dropout
    )


def _build_projections(config: Any, block: Block) -> nn.Module:
    return Projections(block.width, config.hidden_size)


PARALLEL_HOULSBY = Method(
    name="parallel_houlsby",
    build=_build_parallel,
    unmergeable="its bottlenecks are not linear, so no weight of the base model can take them up.",
)
HOULSBY_PAL = Method(
    name="houlsby_pal",
    build=_build_houlsby_pal,
    build_shared=_build_projections,
    prepare=with_hidden_size,
    unmergeable="its bottlenecks are not linear and its PALs attend over the tokens.",
)
HOULSBY = Method(
    name="houlsby",
    build=lambda config, block: None,
    unmergeable="its bottlenecks are not linear, so no weight of the base model can take them up.",
)
