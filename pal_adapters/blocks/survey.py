"""Which parts of a model are reached: its stacks of blocks, recognised or not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .sites import Block, iter_blocks, refusal_of
from .walk import named_modules


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


def _above(name: str) -> list[str]:
    """The names of the modules that hold a module."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def survey(model: nn.Module, named: Mapping[str, str] | None = None) -> list[Stack]:
    """All stacks of a model, by list and class of block, those with known sites and those without."""
    groups: dict[tuple[str, str], list[tuple[str, Block | None]]] = {}
    found = {block.name: block for block in iter_blocks(model, named)}
    stages = {above for name in found for above in _above(name)}
    taken = set(found)
    for name, module in named_modules(model, units=False).items():
        block = found.get(name)
        if block is None:
            if name in stages or not name.rpartition(".")[2].isdigit() or not taken.isdisjoint(_above(name)):
                continue
            if not _is_block(module) and refusal_of(module) is None:
                continue
            taken.add(name)
        key = (name.rpartition(".")[0], type(module).__name__)
        groups.setdefault(key, []).append((name, block))
    return [
        Stack(path, kind, tuple(n for n, _ in members), tuple(b for _, b in members if b is not None))
        for (path, kind), members in groups.items()
    ]


def missed(stacks: Iterable[Stack]) -> list[Stack]:
    """The stacks whose structure is not known and, of a partly known class, the blocks that are not known."""
    return _without(stacks, {block.name for stack in stacks for block in stack.blocks})


def _without(stacks: Iterable[Stack], names: Collection[str]) -> list[Stack]:
    left = [(stack, tuple(name for name in stack.names if name not in names)) for stack in stacks]
    return [replace(stack, names=rest) for stack, rest in left if rest]


def partial_reach(model: nn.Module, reached: Iterable[Block]) -> str:
    """A sentence that says which blocks a method reaches and which not, `""` if it reaches all.

    Args:
        model: the model.
        reached: the blocks that the method reaches.
    """
    stacks = survey(model)
    names = {block.name for block in reached}
    left = _without(stacks, names)
    if not left:
        return ""
    others = {name for stack in left for name in stack.names}
    unknown = [str(stack) for stack in missed(stacks)]
    unattended = [
        str(replace(stack, names=rest))
        for stack in left
        if (rest := tuple(block.name for block in stack.blocks if block.name in others))
    ]
    sentences = [f"only a part of {type(model).__name__} is adapted: {'; '.join(map(str, _without(stacks, others)))}."]
    if unknown:
        sentences.append(f"The structure of {'; '.join(unknown)} is not known.")
    if unattended:
        sentences.append(f"A module that attends cannot be added to {'; '.join(unattended)}.")
    return " ".join(sentences)
