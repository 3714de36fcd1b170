"""The `adapters` binding for methods with one network for many tasks: the part in each block, and `task_ids`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from adapters.composition import AdapterCompositionBlock, Stack
from adapters.context import AdapterSetup, ForwardContext
from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.network import NetworkHooks
from pal_adapters.hooks.network_copies import give_weights, start_weights
from pal_adapters.hooks.task_ids import ARGUMENT, task_numbers
from pal_adapters.hosts.in_place import keep_originals
from pal_adapters.hosts.method import generator_for
from pal_adapters.nn.tracing import tracing
from pal_adapters.nn.unit import BatchTasks, TaskUnit, batch_tasks

from .config import given_configs

_WITHOUT_PRETRAINED: ContextVar[str] = ContextVar("pal_adapters_without_pretrained", default="")


@contextmanager
def whole_model_loaded() -> Iterator[None]:
    """While the body builds a model with the adapters that its config lists: their trained weights come with it."""
    token = _WITHOUT_PRETRAINED.set("the model was saved as a whole, with the trained values in place of them")
    try:
        yield
    finally:
        _WITHOUT_PRETRAINED.reset(token)


class UnitsOfBlock(Protocol):
    """What the network needs from the layer of its block."""

    adapters_config: Any

    @property
    def model(self) -> nn.Module: ...

    @property
    def block(self) -> Block: ...

    def setup(self) -> AdapterCompositionBlock | None: ...

    def units(self, name: str) -> Iterator[TaskUnit]: ...


class LayerNetwork:
    """The part of one network in one block of an `adapters` model.

    Args:
        layer: the block's layer, which holds the units.
    """

    def __init__(self, layer: UnitsOfBlock) -> None:
        self._layer = layer
        self.hooks = NetworkHooks(layer.model, layer.block, self)

    def complete(self, unit: TaskUnit, config: Any, added: set[int]) -> None:
        """Give a new unit the pretrained weights that it trains, and install its hooks.

        Args:
            unit: the unit.
            config: its config.
            added: parameters of the model that are not pretrained, by id.
        """
        made: Any = unit
        block = self._layer.block
        give_weights(made, block, self._layer.model, config, added=added, lost=_WITHOUT_PRETRAINED.get())
        keep_originals(made.in_place)
        start_weights(made, block, config, generator_for(config.init_weights_seed, block))
        self.hooks.require(made)

    def remove(self) -> None:
        """Remove the hooks."""
        self.hooks.remove()

    # The runner for `NetworkHooks`

    def _active(self) -> tuple[str, Any] | None:
        layer = self._layer
        setup = layer.setup()
        if setup is None:
            return None
        names = [name for name in setup.flatten() if any(unit.is_network for unit in layer.units(name))]
        if not names:
            return None
        plain = isinstance(setup, Stack) and all(isinstance(child, str) for child in setup)
        if len(names) > 1 or not plain:
            raise UnsupportedError(
                f"{', '.join(map(repr, sorted(names)))} cannot be active in {setup}: a network for many tasks steers "
                "the whole model. Activate one of them, alone or in a Stack with adapters of other methods."
            )
        return names[0], next(unit for unit in layer.units(names[0]) if unit.is_network)

    def network(self) -> Any:
        active = self._active()
        return None if active is None else active[1]

    def batch_tasks(self, batch: int, device: torch.device) -> BatchTasks:
        active = self._active()
        assert active is not None
        tasks = _tasks(self._layer.adapters_config, active[0])
        assert tasks is not None
        context = ForwardContext.get_context()
        # Every block asks: read `task_ids`, which may be on a GPU, once per forward pass.
        known: dict[Any, BatchTasks] = {}
        ids = getattr(context, "task_ids", None)
        if tracing():  # sizes may be symbols, which cannot be looked up
            return batch_tasks(task_numbers(ids, tasks, batch)).to(device)
        if context is not None:
            known = context.__dict__.setdefault("pal_adapters_batch_tasks", known)
        key = (active[0], batch, device)
        if key not in known:
            known[key] = batch_tasks(task_numbers(ids, tasks, batch)).to(device)
        return known[key]


def _tasks(adapters_config: Any, name: str) -> list[str] | None:
    """The tasks of an adapter that is one network for many tasks."""
    configs = given_configs(adapters_config.get(name))
    return next((config.tasks for config in configs if config.method.network), None)


def with_task_tensor(adapters_config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate`, with an active network's `task_ids` as a tensor."""
    ids = arguments.get(ARGUMENT)
    if not isinstance(ids, (list, tuple)) or adapters_config is None:
        return arguments
    given = AdapterSetup.get_context()
    setup = adapters_config.active_setup if given is None else given.adapter_setup
    for name in () if setup is None else setup.flatten():
        tasks = _tasks(adapters_config, name)
        if tasks is not None:
            return {**arguments, ARGUMENT: task_numbers(ids, tasks, len(ids))}
    return arguments
