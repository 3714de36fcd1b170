"""Whether a block still stands in its model: users cut models and replace blocks, hooks elsewhere would stay."""

from __future__ import annotations

import warnings

from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.nn.tracing import tracing


class Presence:
    """Whether a block is part of its model.

    Args:
        model: the model that holds the block.
        block: the block.
    """

    def __init__(self, model: nn.Module, block: Block) -> None:
        self._model = (model,)
        self._block = block
        # At the block's place: the block, or what somebody put around it.
        self._found: tuple[nn.Module | None] = (block.module,)

    def holds(self) -> bool:
        """Whether the block, or something around it, is still at its place."""
        if tracing():
            return True
        found = self._at_its_place()
        if found is self._found[0]:
            return True
        if found is None or all(part is not self._block.module for part in found.modules()):
            return False
        self._found = (found,)
        return True

    def _at_its_place(self) -> nn.Module | None:
        module: nn.Module | None = self._model[0]
        for name in self._block.name.split("."):
            module = None if module is None else module._modules.get(name)
        return module

    def warn(self) -> None:
        """Say that the parts of an adapter outside of the block are removed, too."""
        warnings.warn(
            f"{self._block.name} was cut off or replaced after an adapter was added to it. What the adapter did "
            "behind the blocks and in the embeddings is removed with it: delete the adapter, and add it again.",
            stacklevel=2,
        )
