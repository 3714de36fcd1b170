"""What both hosts' CA-MTL configs have in common: presets, checks, and how the modules of a block are chosen."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from pal_adapters.blocks.norms import full_norms
from pal_adapters.blocks.sites import Block
from pal_adapters.checks import require_bool, require_int, require_one_of
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.hosts.method import Method

from .layer import ConditionalBlock
from .task import TaskConditions

PRESETS: dict[str, dict[str, Any]] = {
    "ca_mtl_base": {"bottleneck": "top"},
    "ca_mtl_large": {"bottleneck": "stream"},
    "ca_mtl_base_code": {"bottleneck": "top", "freeze_rule": "code", "top_block_init": "scratch"},
    "ca_mtl_large_code": {"bottleneck": "stream", "freeze_rule": "code"},
}
"""The two released networks with the recommended switches, and as released (then with the authors' initialisation)."""


def preset_values(name: str, init: tuple[str, Any]) -> dict[str, Any]:
    """The fields of a preset.

    Args:
        name: one of `PRESETS`.
        init: the host's field and value for the authors' initialisation.
    """
    require_one_of("name", name, PRESETS)
    values = dict(PRESETS[name])
    if name.endswith("_code"):
        values[init[0]] = init[1]
    return values


def task_list(tasks: Any) -> list[str] | None:
    """`tasks` as names: a number stands for `"0"`, `"1"` and so on."""
    if tasks is None:
        return None
    if isinstance(tasks, int) and not isinstance(tasks, bool) and tasks > 0:
        return [str(number) for number in range(tasks)]
    fine = isinstance(tasks, (list, tuple)) and tasks and all(isinstance(t, str) and t for t in tasks)
    if not fine or len(set(tasks)) != len(tasks):
        raise ConfigError(f"tasks={tasks!r} is not allowed: pass a list of different names, or how many there are.")
    return list(tasks)


def _require_blocks(argument: str, value: Any) -> None:
    fine = value is None or (
        isinstance(value, (list, tuple))
        and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    )
    if not fine:
        raise ConfigError(f"{argument}={value!r} is not allowed: use a list of block indices from 0, or None.")


def validate(config: Any) -> None:
    """Check the fields of a CA-MTL config.

    Raises:
        ConfigError: names the argument, the value and what is allowed.
    """
    require_int("max_length", config.max_length, minimum=1)
    require_one_of("attention_modulation", config.attention_modulation, ("columns", "matrix"))
    require_one_of("bottleneck", config.bottleneck, ("top", "stream", "none"))
    require_one_of("freeze_rule", config.freeze_rule, ("intended", "code"))
    require_one_of("top_block_init", config.top_block_init, ("pretrained", "scratch"))
    for name in ("alignment", "norm_modulate_bias", "train_base", "freeze_embeddings"):
        require_bool(name, getattr(config, name))
    for name in ("attention_layers", "norm_layers", "freeze_layers"):
        _require_blocks(name, getattr(config, name))
    if config.bottleneck_size is not None:
        require_int("bottleneck_size", config.bottleneck_size, minimum=1)
        if config.bottleneck == "none":
            _no_effect("bottleneck_size", config.bottleneck_size, "bottleneck='none'")
    if config.norm_modulate_bias and config.norm_layers is not None and not config.norm_layers:
        _no_effect("norm_modulate_bias", True, "norm_layers=[]")
    if (
        config.attention_layers is not None
        and not config.attention_layers
        and config.attention_modulation != "columns"
    ):
        _no_effect("attention_modulation", config.attention_modulation, "attention_layers=[]")
    if not config.train_base:
        if config.freeze_layers is not None:
            _no_effect("freeze_layers", config.freeze_layers, "train_base=False")
        if config.freeze_rule == "code":
            _no_effect("freeze_rule", "code", "train_base=False")
        if config.top_block_init == "scratch":
            _no_effect("top_block_init", "scratch", "train_base=False")
        if not config.freeze_embeddings:
            _no_effect("freeze_embeddings", False, "train_base=False")


def _no_effect(argument: str, value: Any, other: str) -> None:
    raise ConfigError(f"{argument}={value!r} has no effect with {other}: leave it out.")


def frozen_by_default(config: Any, depth: int) -> list[int]:
    """The advised freezing: blocks 0 to 4 of 12 with a bottleneck at the top, 0 to 11 of 24 with a side stream."""
    return list(range(depth // 2 if config.bottleneck == "stream" else max(0, depth // 2 - 1)))


def _upper_half(depth: int) -> list[int]:
    return list(range(depth - depth // 2, depth))


def _prepare(config: Any, blocks: list[Block], base_parameters: int) -> Any:
    if config.tasks is None:
        raise ConfigError(
            "tasks=None is not allowed: pass tasks=[...], the names of the tasks, or how many there are."
        )
    first = blocks[0]
    if any(block.stack != first.stack for block in blocks):
        raise UnsupportedError(
            "ca_mtl steers one stack of blocks, and this model has several (an encoder and a decoder, or vision and "
            "text): use it on a model with one stack."
        )
    if len(blocks) != first.depth:
        raise ConfigError(
            f"ca_mtl is one network in all {first.depth} blocks, but {len(blocks)} were chosen: say which blocks get "
            "which module by attention_layers and norm_layers."
        )
    if any("Albert" in cls.__name__ for cls in type(first.module).__mro__):
        raise UnsupportedError("ca_mtl cannot steer ALBERT: its blocks stand at several depths at once.")
    depth = first.depth
    for name in ("attention_layers", "norm_layers", "freeze_layers"):
        value = getattr(config, name)
        if value is not None and any(i >= depth for i in value):
            raise ConfigError(f"{name}={list(value)} is not allowed: the blocks are 0 to {depth - 1}.")
    if config.top_block_init == "scratch" and config.freeze_layers is not None and depth - 1 in config.freeze_layers:
        raise ConfigError(
            f"top_block_init='scratch' is not allowed with freeze_layers={config.freeze_layers}: the top block is "
            "frozen."
        )
    changes: dict[str, Any] = {}
    if config.train_base and config.freeze_layers is None:
        changes["freeze_layers"] = frozen_by_default(config, depth)
    if config.norm_layers is None:
        changes["norm_layers"] = _upper_half(depth)
    if config.attention_layers is None:
        changes["attention_layers"] = list(range(depth))
    return replace_fields(config, changes)


def replace_fields(config: Any, changes: dict[str, Any]) -> Any:
    """Replace fields as each host does with its own configs: a new one in adapters, written to in PEFT."""
    if hasattr(config, "replace"):
        return config.replace(**changes)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _build(config: Any, block: Block) -> ConditionalBlock:
    norms = tuple(full_norms(block)) if block.index in config.norm_layers else ()
    bottlenecks = 0
    closing: Literal["own", "final", "none"] = "none"
    if block.last and config.bottleneck == "top":
        bottlenecks, closing = 1, "own" if block.sites.norm == "post" else "final"
    elif block.last and config.bottleneck == "stream":
        bottlenecks = block.depth
    frozen = config.freeze_layers or ()
    return ConditionalBlock(
        block.width,
        max_length=config.max_length if block.index in config.attention_layers else None,
        attention_modulation=config.attention_modulation,
        freeze_attention_film=config.freeze_rule == "code" and block.index in frozen,
        norms=norms,
        modulate_bias=config.norm_modulate_bias,
        bottlenecks=bottlenecks,
        bottleneck_size=config.bottleneck_size,
        closing_norm=closing,
    )


def _build_shared(config: Any, block: Block) -> nn.Module:
    # On the meta device a host asks whether there is anything shared before `tasks` is checked.
    return TaskConditions(block.width, len(config.tasks or [""]), alignment=config.alignment)


METHOD = Method(
    name="ca_mtl",
    build=_build,
    build_shared=_build_shared,
    prepare=_prepare,
    unmergeable="its modules depend on the task of each row, which no weight of the base model does.",
    network=True,
)
