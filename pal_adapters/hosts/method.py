"""What a method tells the host bindings about itself. Methods register here; the bindings name none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.nn.unit import TaskUnit


class MethodConfig(Protocol):
    """The fields that the bindings themselves read."""

    @property
    def sites(self) -> Mapping[str, str] | None: ...

    @property
    def train_base(self) -> bool: ...


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: its string, such as `"pal"`; also the `architecture` in adapters and, in capitals, the PEFT type.
        build: makes the unit of one block, without initialising it, or None where the method has none.
        build_shared: makes the module that the blocks of one stack share, or None.
        prepare: the config with values that depend on the model filled in.
        unmergeable: why the method cannot be merged into the base weights.
        network: whether an adapter is one network for many tasks, whose units act as `network.NetworkUnit` says.
    """

    name: str
    build: Callable[[Any, Block], TaskUnit | None]
    unmergeable: str
    build_shared: Callable[[Any, Block], nn.Module | None] = lambda config, block: None
    prepare: Callable[[Any, list[Block], int], Any] = lambda config, blocks, base_parameters: config
    network: bool = False


def parameters_of(model: nn.Module, blocks: list[Block], task_parameters: Iterable[nn.Parameter]) -> int:
    """Parameters of the embeddings and the blocks: the part of a model that neither head nor pooler changes.

    Args:
        task_parameters: what task modules added, which does not count.
    """
    seen: set[int] = {id(p) for p in task_parameters}
    total = 0
    modules: list[nn.Module] = [block.module for block in blocks]
    modules += [m for n, m in model.named_modules() if n.endswith("embeddings") or isinstance(m, nn.Embedding)]
    for module in modules:
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.numel()
    return total


def generator_for(seed: int | None, block: Block) -> torch.Generator | None:
    """A generator that gives two adapters with one seed equal weights and two blocks different ones."""
    if seed is None:
        return None
    return torch.Generator().manual_seed(seed * 1_000_003 + block.stack * 10_007 + block.index)
