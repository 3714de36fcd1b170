"""The binding of `adapters` for a method that is one network for many tasks: what acts in a block, and `task_ids`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from adapters.composition import Stack
from adapters.context import ForwardContext
from torch import Tensor

from ..errors import UnsupportedError
from ..units import TaskUnit
from .adapters_config import task_configs
from .base_part import Slots, block_slots, fill, outer_slots, scratch
from .methods import generator_for
from .network import NetworkHooks
from .sites import find_blocks
from .tasks import task_numbers

if TYPE_CHECKING:
    from .adapters_layer import TaskLayer


class LayerNetwork:
    """The part of one network in one block of an `adapters` model.

    Args:
        layer: the block's layer, whose units it lets act.
    """

    def __init__(self, layer: TaskLayer) -> None:
        self._layer = layer
        self.hooks = NetworkHooks(layer.model, layer.block, self)

    def complete(self, unit: TaskUnit, config: Any, added: set[int]) -> None:
        """Give a fresh unit its copies of pretrained weights, and install its hooks.

        Args:
            unit: the unit.
            config: its config.
            added: parameters of the model that are not pretrained, by id.
        """
        block, model = self._layer.block, self._layer.model
        made: Any = unit
        if config.train_base:
            inner = {} if block.index in config.freeze_layers else block_slots(block, added)
            fill(made.base, inner)
            if block.last and config.top_block_init == "scratch":
                scratch(made.base, inner, generator_for(config.init_weights_seed, block))
            outer: Slots = {}
            if block.last:
                blocks = find_blocks(model, config.sites)
                for embeddings in (False,) if config.freeze_embeddings else (False, True):
                    outer |= outer_slots(model, blocks, added, left_out=(), embeddings=embeddings)
                fill(made.outer, outer)
            made.slots = (inner, outer)
        self.hooks.require(made)

    def remove(self) -> None:
        """Take the hooks off."""
        self.hooks.remove()

    # The runner of `NetworkHooks`

    def _active(self) -> tuple[str, Any] | None:
        layer = self._layer
        setup = layer.setup()
        if setup is None:
            return None
        names = [name for name in setup.flatten() if any(hasattr(unit, "slots") for unit in layer.units(name))]
        if not names:
            return None
        plain = isinstance(setup, Stack) and all(isinstance(child, str) for child in setup)
        if len(names) > 1 or not plain:
            raise UnsupportedError(
                f"{', '.join(map(repr, sorted(names)))} in {setup} cannot be active so: a network for many tasks "
                "steers the whole model. Activate one of them, alone or in a Stack of adapters of other methods."
            )
        return names[0], next(unit for unit in layer.units(names[0]) if hasattr(unit, "slots"))

    def network(self) -> Any:
        active = self._active()
        return None if active is None else active[1]

    def task_index(self, batch: int, device: torch.device) -> Tensor:
        active = self._active()
        assert active is not None
        whole = self._layer.adapters_config.get(active[0])
        tasks = next(config.tasks for config in task_configs(whole) if config.method.network)
        context = ForwardContext.get_context()
        # Every block asks: look at `task_ids`, which may lie on a GPU, once a forward pass.
        known: dict[Any, Tensor] = {}
        if context is not None and not torch.compiler.is_compiling():
            known = context.__dict__.setdefault("pal_adapters_task_index", known)
        key = (active[0], batch, device)
        if key not in known:
            known[key] = task_numbers(getattr(context, "task_ids", None), tasks, batch).to(device)
        return known[key]
