"""What of a model is reached: its stacks of blocks, found or not. Knows no method and neither host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .sites import Block, iter_blocks


@dataclass(frozen=True)
class Stack:
    """The blocks of one class in one list of a model.

    Attributes:
        path: the path of the list, such as `"model.layers"`.
        block: the class of the blocks.
        names: the paths of the blocks.
        blocks: the same as blocks with known sites; empty for a class whose structure is not known.
    """

    path: str
    block: str
    names: tuple[str, ...]
    blocks: tuple[Block, ...] = ()

    def __str__(self) -> str:
        indices = ", ".join(name.rpartition(".")[2] for name in self.names)
        return f"{self.path} ({self.block}, block{'s' if len(self.names) > 1 else ''} {indices})"


def _is_block(module: nn.Module) -> bool:
    # transformers marks what activation checkpointing repeats; the convolutions in front of audio encoders are not
    # blocks, although they are marked too.
    marked = isinstance(module, GradientCheckpointingLayer)
    return marked and any(isinstance(part, (nn.Linear, Conv1D)) for part in module.modules())


def survey(model: nn.Module, named: Mapping[str, str] | None = None) -> list[Stack]:
    """All stacks of a model, by list and class of block, those with known sites and those without."""
    groups: dict[tuple[str, str], list[tuple[str, Block | None]]] = {}
    found = {block.name: block for block in iter_blocks(model, named)}
    inside: tuple[str, ...] = tuple(f"{name}." for name in found)
    for name, module in model.named_modules():
        block = found.get(name)
        if block is None:
            if name.startswith(inside) or not _is_block(module) or not name.rpartition(".")[2].isdigit():
                continue
            inside = (*inside, f"{name}.")
        key = (name.rpartition(".")[0], type(module).__name__)
        groups.setdefault(key, []).append((name, block))
    return [
        Stack(path, kind, tuple(n for n, _ in members), tuple(b for _, b in members if b is not None))
        for (path, kind), members in groups.items()
    ]


def missed(stacks: Iterable[Stack]) -> list[Stack]:
    """The stacks whose structure is not known, and of a class that is known in part the blocks that are not."""
    left = []
    for stack in stacks:
        reached = {block.name for block in stack.blocks}
        names = tuple(name for name in stack.names if name not in reached)
        if names:
            left.append(Stack(stack.path, stack.block, names))
    return left


def partial_reach(model: nn.Module) -> str:
    """A sentence that says which blocks a method reaches and which not, `""` if it reaches all."""
    stacks = survey(model)
    left = missed(stacks)
    if not left:
        return ""
    reached = [
        Stack(stack.path, stack.block, tuple(block.name for block in stack.blocks)) for stack in stacks if stack.blocks
    ]
    return (
        f"only a part of {type(model).__name__} is adapted: {'; '.join(map(str, reached))}. The structure of "
        f"{'; '.join(map(str, left))} is not known."
    )
