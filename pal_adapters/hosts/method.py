"""The interface between methods and host bindings. Methods register here; the bindings name none of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from pal_adapters.blocks.sites import Block, parse_sites
from pal_adapters.blocks.walk import named_modules, parameters
from pal_adapters.checks import check_fields, shown
from pal_adapters.errors import ConfigError, SiteError
from pal_adapters.nn.unit import TaskUnit

# Why a module that attends cannot know which tokens a block sees, by `BlockSites.mixing`.
_HIDDEN_TOKENS = {
    "local": "attention there sees parts of a text or an image (windows, pooled queries), which no mask shows",
    "other": "tokens are mixed without attention there, or its cache has no place for the tokens of others",
}


def _nothing_shared(options: Any, block: Block) -> nn.Module | None:
    return None


def _nothing_chosen(options: Any, blocks: list[Block], base_parameters: int) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Method:
    """One method, as the host bindings see it.

    The functions take the method's options (`Options`), whichever host they came from.

    Attributes:
        name: in lower case, such as `"pal"`: the `architecture` in adapters and, in capitals, the PEFT type. Names of
            saved tensors contain it.
        build: `build(options, block)` creates the unit of one block, not initialised, or returns None for blocks that
            get none.
        unmergeable: why the method cannot be merged into the base weights, a sentence to follow a colon.
        build_shared: `build_shared(options, block)` makes the module that all blocks of one stack share, or returns
            None. The binding registers it once, initialises it by its own `reset_parameters` and hands its weights to
            each unit (`TaskUnit.share`).
        prepare: `prepare(options, blocks, base_parameters)` is called once for each adapter, before anything is
            built, with the chosen blocks and the number of pretrained parameters (embeddings and blocks). It raises
            `ConfigError` or `UnsupportedError` if the options do not fit the model, and returns values for fields
            that were left open, such as `{"hidden_size": 204}`, which `build` then sees. It must not change the
            options.
        identity: whether the method has an initialisation that leaves the model's output unchanged.
        network: whether an adapter is one network for many tasks, with the units of `hooks.network_unit`.
        fusable: whether the unit only adds a term after the feed-forward part, which a fusion can scale.
        attends: whether the unit mixes tokens: it needs the mask, and is not added to blocks without a usable one
            (windows of an image, a state outside the generation cache).
    """

    name: str
    build: Callable[[Any, Block], TaskUnit | None]
    unmergeable: str
    build_shared: Callable[[Any, Block], nn.Module | None] = _nothing_shared
    prepare: Callable[[Any, list[Block], int], Mapping[str, Any]] = _nothing_chosen
    identity: bool = True
    network: bool = False
    fusable: bool = False
    attends: bool = False

    def reachable(self, blocks: list[Block]) -> list[Block]:
        """The blocks that the method can adapt.

        Raises:
            SiteError: if there are none.
        """
        reached = [block for block in blocks if block.sites.shows_tokens or not self.attends]
        if not reached:
            kinds = ", ".join(sorted({type(block.module).__name__ for block in blocks}))
            reasons = " or ".join(_HIDDEN_TOKENS[mixing] for mixing in sorted({b.sites.mixing for b in blocks}))
            raise SiteError(
                f"{self.name} attends, and cannot be added to {kinds}: {reasons}. Use a method that does not attend: "
                "lhuc, low_rank or houlsby."
            )
        return reached


class Options:
    """Base of a method's options: the dataclass that its configs of both hosts inherit.

    A subclass is a dataclass (`eq=False`, as each host has its own idea of equality) whose fields carry their checks:
    `field(default=6, metadata=option("Attention heads.", integer(1)))`.
    """

    method: ClassVar[Method]
    host: ClassVar[str]
    """The host of a config, `"adapters"` or `"peft"`."""
    storage_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where weights are kept on a model: a saved adapter can be loaded with any value of them."""
    train_base: bool
    """Whether pretrained weights train with the adapter."""
    base_weights: Any = "all"
    """Which: `"all"` of the model's own, `"in_place"` for those of the model's own that `hooks.in_place` lists, or
    `"copies"`, which belong to the adapter and leave the model's own unchanged. A method may make it a field.

    The hosts read attributes here, which costs nothing on a model with a thousand adapters.
    """

    def validate(self) -> None:
        """Check combinations of fields, after the checks of each field.

        Raises:
            ConfigError: names the fields, their values and what is allowed.
        """


def check_options(config: Any) -> None:
    """The checks that configs of both hosts start with: each field, and the names of a block's modules.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """
    check_fields(config)
    if config.sites is not None:
        try:
            parse_sites(config.sites)
        except ConfigError as error:
            if str(error).startswith("sites="):
                raise
            raise ConfigError(f"sites={shown(config.sites)} is not allowed: {error}") from None


def filled(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a config with these field values."""
    result = copy.copy(config)
    result.__dict__.update(values)
    return result


# The config classes of each host, by method
REGISTERED: dict[str, dict[str, type[Options]]] = {"adapters": {}, "peft": {}}


def parameters_of(model: nn.Module, blocks: list[Block], task_parameters: Collection[int]) -> int:
    """The number of parameters of the embeddings and the blocks, without head and pooler.

    Args:
        model: the model.
        blocks: its blocks.
        task_parameters: IDs of parameters of task modules, which are not counted.
    """
    counted: dict[int, int] = {}
    modules: list[nn.Module] = [block.module for block in blocks]
    named = named_modules(model, units=False).items()
    modules += [m for n, m in named if n.endswith("embeddings") or isinstance(m, nn.Embedding)]
    for module in modules:
        for parameter in parameters(module, units=False):
            if id(parameter) not in task_parameters:
                counted[id(parameter)] = parameter.numel()
    return sum(counted.values())


def generator_for(seed: int | None, block: Block) -> torch.Generator | None:
    """A generator with which adapters of the same seed get equal weights, and the blocks of one different ones."""
    if seed is None:
        return None
    return torch.Generator().manual_seed(seed * 1_000_003 + block.stack * 10_007 + block.index)
