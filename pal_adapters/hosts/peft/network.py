"""The PEFT binding for methods with one network for many tasks: layers, tuner and `task_ids`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.blocks.walk import named_modules
from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.call import bind_reruns
from pal_adapters.hooks.in_place import InPlace
from pal_adapters.hooks.network import NetworkHooks
from pal_adapters.hooks.network_copies import give_weights, start_weights
from pal_adapters.hooks.task_ids import ARGUMENT, CARRIED, TaskRows
from pal_adapters.hooks.weight_copies import match_dtypes
from pal_adapters.hosts.in_place import keep_originals, put_originals_back
from pal_adapters.nn.unit import BatchTasks, TaskUnit

from .joint import check_trainable, task_parameter_ids
from .layer import TaskTunerLayer
from .routing import generates
from .tuner import TaskTuner

_ROWS = "pal_adapters_task_rows"


def task_rows(model: nn.Module) -> TaskRows:
    """The `task_ids` of a base model."""
    if not hasattr(model, _ROWS):
        setattr(model, _ROWS, TaskRows())
    return getattr(model, _ROWS)


class NetworkTunerLayer(TaskTunerLayer):
    """The part of the network in one block, for every adapter."""

    def __init__(self, model: nn.Module, block: Block) -> None:
        super().__init__(model, block)
        self.hooks = NetworkHooks(model, block, self)
        task_rows(model)  # created before several threads ask for it
        # By adapter; the same list objects as in the configs.
        self.tasks: dict[str, list[str]] = {}
        self._taken: Any = None
        if block.index == 0:
            self._taken = model.register_forward_pre_hook(self._before_model, with_kwargs=True)

    def _before_model(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Take `task_ids` if no `PeftModel` has, and make them available when checkpointed blocks are rerun."""
        rows = task_rows(model)
        if model.training:
            bind_reruns(model.modules(), rows.call)
        return rows.take(args, kwargs)

    def update_layer(self, adapter_name: str, config: Any, shared: nn.Module | None) -> nn.Module | None:
        self.tasks[adapter_name] = config.tasks
        return super().update_layer(adapter_name, config, shared)

    def complete(self, unit: TaskUnit, config: Any) -> None:
        """Give a new unit the pretrained weights that it trains, and install its hooks."""
        model, block = self._model[0], self._block[0]
        made: Any = unit
        # Only the last block's unit trains weights outside its block; reading the whole model for every block would
        # take time in proportion to the square of the depth.
        copied = model if block.last else block.module
        if config.train_base:
            check_trainable(copied)
        give_weights(
            made,
            block,
            model,
            config,
            added=task_parameter_ids(copied),
            headless=getattr(model, "base_model", model),
            left_out=config.modules_to_save or (),
        )
        keep_originals(made.in_place)
        start_weights(made, block, config, None)
        self.hooks.require(made)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.mark_in_place([] if inference_mode else names)
        for name in names:
            if name in self.units:
                self.units[name].mark_frozen()  # type: ignore[operator]

    def _in_place(self) -> dict[str, InPlace]:
        """What each adapter trains in place of this block, and of what is outside all blocks."""
        units: dict[str, Any] = dict(self.units.items())
        return {name: unit.in_place for name, unit in units.items() if unit.in_place is not None}

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, part in self._in_place().items():
            if name in names:
                part.train(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            self.mark_in_place([])

    def mark_in_place(self, training: Collection[str]) -> None:
        """Make the weights trainable that these adapters train in place, and freeze those of others."""
        for name, part in self._in_place().items():
            part.train(name in training)

    def require_in_place(self, adapter_name: str) -> None:
        """Raise `UnsupportedError` if weights that an adapter trains in place have been replaced."""
        part = self._in_place().get(adapter_name)
        if part is not None:
            part.require_present(self.base_layer, self._model[0])

    def delete_adapter(self, adapter_name: str) -> None:
        part = self._in_place().get(adapter_name)
        if part is not None:
            put_originals_back([part])
        super().delete_adapter(adapter_name)

    def forget(self, adapter_name: str) -> None:
        self.tasks.pop(adapter_name, None)
        super().forget(adapter_name)

    def detach(self) -> None:
        self.hooks.remove()
        if self._taken is not None:
            self._taken.remove()
        super().detach()

    # The runner for `NetworkHooks`

    def _active(self) -> str | None:
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.units]
        if len(names) > 1:
            raise UnsupportedError(
                f"{' and '.join(map(repr, names))} are active together, but each {self.method.name} adapter steers "
                "the whole model: activate one of them."
            )
        return names[0] if names else None

    def network(self) -> Any:
        name = self._active()
        return None if name is None else self.units[name]

    def batch_tasks(self, batch: int, device: torch.device) -> BatchTasks:
        name = self._active()
        assert name is not None
        return task_rows(self._model[0]).of(self.tasks[name], batch, device)


class NetworkTuner(TaskTuner):
    """Base of the tuners of methods with one network for many tasks."""

    tuner_layer_cls = NetworkTunerLayer
    forward_arguments = (ARGUMENT, CARRIED)

    @staticmethod
    def _on_task_ids(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before `PeftModelFor*.forward`, which would drop `task_ids`: pass them on under another name."""
        if ARGUMENT in kwargs:
            kwargs = {**kwargs, CARRIED: kwargs[ARGUMENT]}
            del kwargs[ARGUMENT]
        return args, kwargs

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(
                f"adapter_names is not supported for {self.method.name}: one adapter serves all tasks. Pass task_ids."
            )
        ids = kwargs.pop(ARGUMENT, None)
        carried = kwargs.pop(CARRIED, None)
        with task_rows(self.model).in_force(carried if ids is None else ids, repeated=generates(self.model, kwargs)):
            yield

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        training = [name for name in self.active_adapters if not self.peft_config[name].inference_mode]
        for layer in named_modules(model, units=False).values():
            if isinstance(layer, NetworkTunerLayer):
                layer.mark_in_place(training)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's cast of half precision to float32, undone for copies of pretrained weights."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in named_modules(self.model, units=False).values():
            if isinstance(layer, NetworkTunerLayer) and adapter_name in layer.units:
                unit: Any = layer.units[adapter_name]
                for slots, copies in zip(unit.slots, (unit.base, unit.outer), strict=True):
                    match_dtypes(copies, slots)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, which may repeat the examples of a batch."""
        task_rows(self.model).allow_repeated()
        return self.model.generate(*args, **kwargs)
