"""What both hosts' PAL configs have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.checks import require_bool, require_int, require_multiple, require_one_of, require_probability
from pal_adapters.errors import ConfigError
from pal_adapters.hosts.method import Method

from .layer import PAL, Projections, default_hidden_size


def validate(config: Any) -> None:
    """Check the fields of a PAL config.

    Raises:
        ConfigError: names the argument, the value and what is allowed.
    """
    require_int("num_heads", config.num_heads, minimum=1)
    if config.hidden_size is not None:
        require_int("hidden_size", config.hidden_size, minimum=1)
        require_multiple("hidden_size", config.hidden_size, "num_heads", config.num_heads)
    require_probability("dropout", config.dropout)
    require_one_of("activation_site", config.activation_site, ("output", "middle", "none"))
    require_one_of("pal_input", config.pal_input, ("norm", "raw"))
    for name in ("tie_projections", "use_bias", "lhuc"):
        require_bool(name, getattr(config, name))


def _build(config: Any, block: Block) -> PAL:
    return PAL(
        block.width,
        config.hidden_size,
        num_heads=config.num_heads,
        dropout=config.dropout,
        activation_site=config.activation_site,
        bias=config.use_bias,
        tied=config.tie_projections,
        lhuc=config.lhuc,
        reads="raw" if config.pal_input == "raw" else "x",
    )


def _build_shared(config: Any, block: Block) -> nn.Module | None:
    return Projections(block.width, config.hidden_size, bias=config.use_bias) if config.tie_projections else None


def with_hidden_size(config: Any, blocks: list[Block], base_parameters: int) -> Any:
    """The config with a number for `hidden_size=None`, see `default_hidden_size`."""
    if config.hidden_size is not None:
        return config
    block = blocks[0]
    size = default_hidden_size(block.width, block.depth, base_parameters, config.num_heads)
    return replace_field(config, "hidden_size", size)


def replace_field(config: Any, name: str, value: Any) -> Any:
    """Replace a field as each host does with its own configs: a new one in adapters, written to in PEFT."""
    if hasattr(config, "replace"):
        return config.replace(**{name: value})
    setattr(config, name, value)
    return config


def check_input(config: Any, blocks: list[Block]) -> None:
    """Raise `ConfigError` for `pal_input="raw"` where no block has a norm in front of attention."""
    if config.pal_input == "raw" and all(block.sites.norm == "post" for block in blocks):
        raise ConfigError(
            "pal_input='raw' has no effect on this model: its blocks are post-LN and their input is what the "
            "module reads "
            "anyway. Leave pal_input='norm'."
        )


def _prepare(config: Any, blocks: list[Block], base_parameters: int) -> Any:
    check_input(config, blocks)
    return with_hidden_size(config, blocks, base_parameters)


METHOD = Method(
    name="pal",
    build=_build,
    build_shared=_build_shared,
    prepare=_prepare,
    unmergeable="a PAL attends over the tokens, which no weight of the base model does.",
)
