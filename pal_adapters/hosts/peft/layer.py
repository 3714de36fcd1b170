"""The PEFT layer that is added to each block, and the base class of all PEFT layers of this package."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pal_adapters.blocks.placement import computing_device
from pal_adapters.blocks.sites import Block, mark_added
from pal_adapters.blocks.walk import named_modules
from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.attachment import Attachment
from pal_adapters.hooks.call import CallValue, runs_again
from pal_adapters.hooks.rows import RowPlan, run_rows, run_unit
from pal_adapters.hosts.method import Method
from pal_adapters.nn.unit import TaskUnit, UnitInputs

from .joint import mark_base

# Kept outside the models, so that `unload` leaves nothing behind.
_PLANS: WeakKeyDictionary[nn.Module, CallValue] = WeakKeyDictionary()
_LOCK = threading.Lock()
# In place of a `RowPlan` in calls without `adapter_names`.
ACTIVE = "the active adapters"

mark_added(BaseTunerLayer, AuxiliaryTrainingWrapper)


def plans_of(model: nn.Module) -> CallValue:
    """Where a base model keeps the `RowPlan` of each thread's current call; `ACTIVE` if it has no `adapter_names`."""
    with _LOCK:
        return _PLANS.setdefault(model, CallValue())


class TunerLayer(nn.Module, BaseTunerLayer):
    """Base of all layers: holds units by adapter name, none of which can be merged.

    Args:
        model: the base model.
        width: `d`, of the value that the layer changes.
        near: the module whose device and dtype a new adapter takes.
    """

    method: ClassVar[Method]

    def __init__(self, model: nn.Module, width: int, near: nn.Module) -> None:
        super().__init__()
        # Tuples, so that neither is registered as a child.
        self._model = (model,)
        self._near = (near,)
        self.plans = plans_of(model)
        # Whether there have been calls with `adapter_names` and gradients.
        self.routes_training = False
        self.in_features = self.out_features = width
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    @property
    def plan(self) -> RowPlan | None:
        """The adapter of each example while `adapter_names` applies in this thread.

        Raises:
            UnsupportedError: if something runs a part of a model again without its call, whose names are not known.
        """
        plan = self.plans.value
        if plan is None and self.routes_training and runs_again():
            raise UnsupportedError(
                f"{self.method.name} runs again in the backward pass outside of a call of the model, so the "
                "adapter_names of that call are not known: turn activation checkpointing on with "
                "model.gradient_checkpointing_enable(), or checkpoint the call of the whole model."
            )
        return plan if isinstance(plan, RowPlan) else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._mark_base(trainable=not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._mark_base(trainable=enabled)

    def _mark_base(self, *, trainable: bool) -> None:
        # transformers' `set_adapter` only calls layers, so the first layer applies `train_base` for all of them.
        first = next((layer for layer in self._model[0].modules() if isinstance(layer, TunerLayer)), None)
        if first is self:
            mark_base(self._model[0], self.active_adapters if trainable else [])

    def place(self, adapter_name: str, *, inference_mode: bool) -> None:
        """Move a new adapter to the base model's device and dtype, and decide whether it trains."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=inference_mode)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = self._stored_as(base_layer)
        return (None if device is None else computing_device(self._near[0], device)), dtype

    def _stored_as(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        # The weights of a quantised module are packed; the norms next to it have the dtype it computes in.
        for module in itertools.chain([base_layer], self._near[0].modules()):
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                continue
            if weight.dim() == 1 or module is base_layer:
                return weight.device, weight.dtype
        tensors = (t for m in (base_layer, self._near[0]) for t in (*m.parameters(), *m.buffers()))
        packed = next(tensors, None)
        dtype = getattr(base_layer, "compute_dtype", None)
        return (None if packed is None else packed.device), (dtype if isinstance(dtype, torch.dtype) else None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UnsupportedError(f"{self.method.name} cannot be merged: {self.method.unmergeable}")

    def unmerge(self) -> None:
        """Do nothing: no adapter is ever merged."""

    def detach(self) -> None:
        """Restore the base model."""
        raise NotImplementedError

    def forget(self, adapter_name: str) -> None:
        """Remove an adapter without activating another, and the layer itself with its last adapter."""
        for name in self.adapter_layer_names:
            if adapter_name in (container := getattr(self, name)):
                del container[adapter_name]
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
        if not self._all_available_adapter_names():
            self.detach()

    def run_active(self, units: nn.ModuleDict, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        """Run the active units at `site` in order of activation, or each example through its own unit."""
        plan = self.plan
        if plan is not None:
            plan = plan.for_batch(value.shape[0])
            return run_rows(units, plan, site, value, inputs._replace(slot=("rows",)))  # type: ignore[arg-type]
        for name in self.active_adapters:
            if name in units:
                unit = units[name]
                assert isinstance(unit, TaskUnit)
                if site in unit.sites:
                    value = run_unit(unit, site, value, inputs._replace(slot=(name,)))
        return value

    def __repr__(self) -> str:
        # `get_layer_status` shows the part before the first bracket.
        return f"{self.method.name}.{super().__repr__()}"


class TaskTunerLayer(TunerLayer):
    """One method's modules in one block, for every adapter.

    It is a child of the block rather than a wrapper: base weights keep their names, and the block its class and
    attributes. `<prefix>units.<adapter name>` are the units. `<prefix>shared.<adapter name>` are the weights that the
    blocks of a stack share, registered only in the first adapted block, so that they are counted, saved and trained
    once.

    Args:
        model: the base model.
        block: the block.
    """

    prefix: ClassVar[str]

    def __init__(self, model: nn.Module, block: Block) -> None:
        super().__init__(model, block.width, block.module)
        self._block = (block,)
        self.attachment = Attachment(model, block, self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "method"):  # a base class for layers of several methods
            return
        cls.prefix = f"{cls.method.name}_"
        cls.adapter_layer_names = (f"{cls.prefix}units", f"{cls.prefix}shared")

    @property
    def base_layer(self) -> nn.Module:
        return self._block[0].module

    @property
    def units(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    @property
    def shared(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[1])

    def update_layer(self, adapter_name: str, config: Any, shared: nn.Module | None) -> nn.Module | None:
        """Add the module of an adapter.

        Args:
            shared: the adapter's shared weights from an earlier block of the stack, or None in the first.

        Returns:
            The adapter's shared weights, for the next block.
        """
        block = self._block[0]
        unit = self.method.build(config, block)
        if unit is None:
            return shared
        identity = config.identity_init
        if shared is None:
            shared = self.method.build_shared(config, block)
            if shared is not None:
                shared.reset_parameters(identity=identity)  # type: ignore[operator]
                self.shared[adapter_name] = shared
        if shared is not None:
            unit.share(shared)
        unit.reset_parameters(identity=identity)
        unit.train(self.training)
        self.complete(unit, config)
        self.units[adapter_name] = unit
        self.place(adapter_name, inference_mode=config.inference_mode)
        return shared

    def complete(self, unit: TaskUnit, config: Any) -> None:
        """Install the hooks that a new unit needs."""
        self.attachment.require(unit.sites, unit.needs)

    def detach(self) -> None:
        """Remove the hooks and the layer from the block."""
        self.attachment.remove()
        delattr(self.base_layer, self.method.name)

    # `Runner`, for `Attachment`

    def is_active(self, site: str) -> bool:
        if self.disable_adapters:
            return False
        names = self.active_adapters if self.plan is None else self.plan.names
        return any(name in self.units and site in self.units[name].sites for name in names)  # type: ignore[operator]

    def keeps_inputs(self) -> bool:
        return False

    def run(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        return self.run_active(self.units, site, value, inputs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("a task layer cannot be called: its hooks run when its block is called.")


def entry(units: nn.ModuleDict, name: str, default: nn.Module) -> nn.Module:
    """`dict.get` for an `nn.ModuleDict`, which has none."""
    return units[name] if name in units else default  # noqa: SIM401


def remove_adapter_name(key: str, prefix: str, adapter_name: str) -> str:
    """`...pal_units.rte.query.weight` -> `...pal_units.query.weight`.

    `base_layer`, from another method's wrapper around a module, is dropped: files use the names of the base model.
    """
    match = re.search(rf"(?:^|\.){re.escape(prefix)}[a-z]+(\.{re.escape(adapter_name)})(?=\.|$)", key)
    if match is None:
        return key
    path = [part for part in key[: match.start()].split(".") if part != "base_layer"]
    return ".".join(path) + key[match.start() : match.start(1)] + key[match.end() :]


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All PEFT layers of a model with their names."""
    for name, module in named_modules(model, units=False).items():
        if isinstance(module, nn.Module) and isinstance(module, BaseTunerLayer):
            yield name, module
