"""The options and presets of CA-MTL, and how the host bindings choose the modules of a block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pal_adapters.blocks.norms import full_norms
from pal_adapters.blocks.sites import Block
from pal_adapters.checks import (
    boolean,
    either,
    integer,
    list_of,
    one_of,
    option,
    optional,
    require_one_of,
    string,
)
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.hosts.method import Method, Options
from pal_adapters.methods.released import CAMTL_PRESETS, draw_weights, freezes_attention_film

from .layer import ConditionalBlock
from .task import TaskConditions

PRESETS: dict[str, dict[str, Any]] = {
    "ca_mtl_base": {"bottleneck": "top"},
    "ca_mtl_large": {"bottleneck": "stream"},
    **CAMTL_PRESETS,
}
"""The two networks with the recommended settings, and as released (`_code`, with the authors' initialisation)."""

MOST_TASKS = 10_000

_blocks = optional(list_of(integer(0), "block indices from 0", maximum=10_000))


def preset_values(name: str, init: tuple[str, Any]) -> dict[str, Any]:
    """The fields of a preset.

    Args:
        name: one of `PRESETS`.
        init: the host's field and value for the authors' initialisation.
    """
    require_one_of("name", name, PRESETS)
    return {**PRESETS[name], **({init[0]: init[1]} if name in CAMTL_PRESETS else {})}


def task_list(tasks: Any) -> list[str] | None:
    """`tasks` as names: a number stands for `"0"`, `"1"` and so on."""
    if isinstance(tasks, int):
        return [str(number) for number in range(tasks)]
    return None if tasks is None else list(tasks)


def _build(options: CAMTLOptions, block: Block) -> ConditionalBlock:
    assert options.norm_layers is not None
    assert options.attention_layers is not None
    norms = tuple(full_norms(block)) if block.index in options.norm_layers else ()
    bottlenecks = 0
    closing: Literal["own", "final", "none"] = "none"
    if block.last and options.bottleneck == "top":
        bottlenecks, closing = 1, "own" if block.sites.norm == "post" else "final"
    elif block.last and options.bottleneck == "stream":
        bottlenecks = block.depth
    return ConditionalBlock(
        block.width,
        max_length=options.max_length if block.index in options.attention_layers else None,
        attention_modulation=options.attention_modulation,  # type: ignore[arg-type]
        freeze_attention_film=freezes_attention_film(
            options.freeze_rule, block.index in (options.freeze_layers or ())
        ),
        norms=norms,
        modulate_bias=options.norm_modulate_bias,
        bottlenecks=bottlenecks,
        bottleneck_size=options.bottleneck_size,
        closing_norm=closing,
    )


def _build_shared(options: CAMTLOptions, block: Block) -> nn.Module:
    # On the meta device, a host calls this before `tasks` is checked.
    return TaskConditions(block.width, len(task_list(options.tasks) or [""]), alignment=options.alignment)


def frozen_by_default(options: CAMTLOptions, depth: int) -> list[int]:
    """The recommended freezing: blocks 0 to 4 of 12 with a bottleneck at the top, 0 to 11 of 24 with a side stream."""
    return list(range(depth // 2 if options.bottleneck == "stream" else max(0, depth // 2 - 1)))


def _check_model(options: CAMTLOptions, blocks: list[Block]) -> None:
    if options.tasks is None:
        raise ConfigError("tasks=None is not allowed: pass tasks=[...], the names of the tasks, or their number.")
    first = blocks[0]
    if any(block.stack != first.stack for block in blocks):
        raise UnsupportedError(
            "ca_mtl supports one stack of blocks, but this model has several (an encoder and a decoder, or vision and "
            f"text): choose one, in PEFT with target_modules={blocks[0].name.rpartition('.')[0]!r}, for example."
        )
    if len(blocks) != first.depth:
        raise ConfigError(
            f"ca_mtl is one network in all {first.depth} blocks, but {len(blocks)} were selected: select the blocks "
            "of its modules with attention_layers and norm_layers."
        )
    if first.repeated:
        raise UnsupportedError(
            "ca_mtl does not support a model that runs one block at several depths, such as ALBERT."
        )
    if first.sites.layout != "tokens":
        raise UnsupportedError(
            f"ca_mtl does not support {type(first.module).__name__}: its blocks do not pass on hidden states of "
            "[batch, tokens, width], so a block does not know the task of each example."
        )
    depth = first.depth
    for name in ("attention_layers", "norm_layers", "freeze_layers"):
        value = getattr(options, name)
        if value is not None and any(i >= depth for i in value):
            raise ConfigError(f"{name}={list(value)} is not allowed: the blocks are 0 to {depth - 1}.")
    if options.top_block_init == "scratch" and depth - 1 in (options.freeze_layers or ()):
        raise ConfigError(
            f"top_block_init='scratch' is not allowed with freeze_layers={options.freeze_layers}: the top block is "
            "frozen."
        )


def _prepare(options: CAMTLOptions, blocks: list[Block], base_parameters: int) -> Mapping[str, Any]:
    _check_model(options, blocks)
    depth = blocks[0].depth
    chosen: dict[str, Any] = {}
    if options.train_base and options.freeze_layers is None:
        chosen["freeze_layers"] = frozen_by_default(options, depth)
    if options.norm_layers is None:
        chosen["norm_layers"] = list(range(depth - depth // 2, depth))
    if options.attention_layers is None:
        chosen["attention_layers"] = [block.index for block in blocks if block.sites.mixing in ("attention", "local")]
    return chosen


METHOD = Method(
    name="ca_mtl",
    build=_build,
    build_shared=_build_shared,
    prepare=_prepare,
    unmergeable="its modules depend on the task of each example, which weights of the base model cannot.",
    network=True,
)


@dataclass(eq=False)
class CAMTLOptions(Options):
    """The options of `CAMTLConfig` and `CAMTLPeftConfig`.

    The model is conditioned on a learned task embedding by feature-wise linear modulation, see
    `pal_adapters.methods.camtl.film.FiLM`: the embeddings are aligned, a block-diagonal term is added to the attention
    scores of every block, the norms of the upper half are conditional, and there is a linear bottleneck on top
    (`ca_mtl_base`) or a side stream with one after every block (`ca_mtl_large`). Half of the pretrained weights are
    trained too, by default as copies that belong to the adapter. Pass the task of each example as `task_ids`, names
    or numbers, to the model's forward.

    Source: Pilault, El hattami and Pal, "Conditionally Adaptive Multi-Task Learning", ICLR 2021. Differences from the
    released code: the top block keeps its pretrained weights, all conditional modules train, the lower half and the
    embeddings are frozen by default, `max_length` need not divide the width, and FiLM starts at zero by default. The
    presets `"ca_mtl_base_code"` and `"ca_mtl_large_code"` set the switches of the released code.

    Args:
        tasks: names of the tasks, or their number.
        max_length: the longest sequence in tokens; shorter ones use the leading part of the attention term.
        alignment: whether to align the embeddings.
        attention_layers: indices of the blocks with the attention term, from 0; None for all that attend.
        attention_modulation: `"columns"` (as in the released code) or `"matrix"` (the paper's notation), see
            `pal_adapters.methods.camtl.attention.ConditionalAttentionBias`.
        norm_layers: indices of the blocks whose norms are conditional; None for the upper half.
        norm_modulate_bias: modulate the shift of the norms too, as in the paper.
        bottleneck: `"top"` (base), `"stream"` (large) or `"none"`.
        bottleneck_size: inner width of the bottlenecks; None for a third of the model's width.
        train_base: train the pretrained weights that are not frozen, as `base_weights` says.
        freeze_layers: indices of the blocks whose pretrained weights stay frozen; None for 0 to 4 of 12 with
            `bottleneck="top"` and 0 to 11 of 24 with `"stream"`.
        freeze_embeddings: whether to freeze the embeddings.
        freeze_rule: `"intended"` trains all conditional modules; for `"code"` see `pal_adapters.methods.released`.
        top_block_init: `"pretrained"`; for `"scratch"` see `pal_adapters.methods.released`.
        base_weights: `"copies"` trains copies, so that the model without the network is the pretrained one.
            `"in_place"` trains the model's own weights, without the memory of copies. Results are equal, and a saved
            network can be loaded with either. The pretrained values are in a temporary file until the network is
            deleted, which puts them back; until then the network cannot be disabled, and is the only one.

    Raises:
        ConfigError: for a value that is not allowed, or that has no effect with the others.
    """

    method: ClassVar[Method] = METHOD
    storage_only: ClassVar[frozenset[str]] = frozenset({"base_weights"})

    tasks: list[str] | int | None = field(
        default=None,
        metadata=option(
            "Names of the tasks, or their number.",
            optional(either(list_of(string(empty=False), "names", different=True, maximum=MOST_TASKS, minimum=1),
                            integer(1, MOST_TASKS))),
        ),
    )  # fmt: skip
    max_length: int = field(default=128, metadata=option("The longest sequence in tokens.", integer(1)))
    alignment: bool = field(default=True, metadata=option("Align the embeddings.", boolean()))
    attention_layers: list[int] | None = field(
        default=None, metadata=option("Blocks with the attention term; all by default.", _blocks)
    )
    attention_modulation: str = field(
        default="columns", metadata=option("Shape of the modulation.", one_of("columns", "matrix"))
    )
    norm_layers: list[int] | None = field(
        default=None, metadata=option("Blocks with conditional norms; the upper half by default.", _blocks)
    )
    norm_modulate_bias: bool = field(default=False, metadata=option("Modulate the shift of the norms.", boolean()))
    bottleneck: str = field(
        default="top", metadata=option("Place of the bottlenecks.", one_of("top", "stream", "none"))
    )
    bottleneck_size: int | None = field(
        default=None, metadata=option("Inner width of the bottlenecks.", optional(integer(1)))
    )
    train_base: bool = field(default=True, metadata=option("Train pretrained weights.", boolean()))
    freeze_layers: list[int] | None = field(
        default=None, metadata=option("Blocks whose pretrained weights stay frozen.", _blocks)
    )
    freeze_embeddings: bool = field(default=True, metadata=option("Freeze the embeddings.", boolean()))
    freeze_rule: str = field(
        default="intended", metadata=option("Which conditional modules train.", one_of("intended", "code"))
    )
    top_block_init: str = field(
        default="pretrained", metadata=option("Initial weights of the last block.", one_of("pretrained", "scratch"))
    )
    base_weights: str = field(
        default="copies", metadata=option("Train copies or the model's own weights.", one_of("copies", "in_place"))
    )

    def validate(self) -> None:
        if self.bottleneck == "none" and self.bottleneck_size is not None:
            _no_effect("bottleneck_size", self.bottleneck_size, "bottleneck='none'")
        if self.norm_modulate_bias and self.norm_layers is not None and not self.norm_layers:
            _no_effect("norm_modulate_bias", True, "norm_layers=[]")
        without_attention = self.attention_layers is not None and not self.attention_layers
        if without_attention and self.attention_modulation != "columns":
            _no_effect("attention_modulation", self.attention_modulation, "attention_layers=[]")
        if not self.train_base:
            defaults = {"freeze_layers": None, "freeze_rule": "intended", "top_block_init": "pretrained",
                        "freeze_embeddings": True, "base_weights": "copies"}  # fmt: skip
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    _no_effect(name, getattr(self, name), "train_base=False")

    def start_top_block(
        self, weights: Iterable[tuple[Tensor, nn.Module, str]], generator: torch.Generator | None
    ) -> None:
        """Draw the last block's weights anew if `top_block_init` says so."""
        if self.top_block_init == "scratch":
            draw_weights(weights, generator)


def _no_effect(argument: str, value: Any, other: str) -> None:
    raise ConfigError(f"{argument}={value!r} has no effect with {other}: leave it out.")
