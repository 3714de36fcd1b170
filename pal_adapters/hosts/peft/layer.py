"""The layer that a block of a model gets through PEFT, and what all our layers have in common there."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pal_adapters.blocks.sites import Block, mark_added
from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.attachment import Attachment
from pal_adapters.hooks.call import CallValue
from pal_adapters.hooks.rows import RowPlan, run_rows, run_unit
from pal_adapters.hosts.method import Method
from pal_adapters.nn.unit import TaskUnit, UnitInputs

from .joint import mark_base

# Beside the models, so that nothing of it stays on one that is unloaded.
_PLANS: WeakKeyDictionary[nn.Module, CallValue] = WeakKeyDictionary()
_LOCK = threading.Lock()

mark_added(BaseTunerLayer, AuxiliaryTrainingWrapper)


def plans_of(model: nn.Module) -> CallValue:
    """The place of a base model for the `RowPlan` of the call that each thread is in."""
    with _LOCK:
        return _PLANS.setdefault(model, CallValue())


class TunerLayer(nn.Module, BaseTunerLayer):
    """Base of all our layers: a container of units by adapter name, nothing that could be merged.

    Args:
        model: the base model.
        width: `d`, of what the layer changes.
        near: the module whose device and dtype a fresh adapter takes.
    """

    method: ClassVar[Method]

    def __init__(self, model: nn.Module, width: int, near: nn.Module) -> None:
        super().__init__()
        # Tuples, so that neither is registered as a child.
        self._model = (model,)
        self._near = (near,)
        self.plans = plans_of(model)
        self.in_features = self.out_features = width
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    @property
    def plan(self) -> RowPlan | None:
        """The adapter of each row while `adapter_names` is in force in this thread."""
        return self.plans.value

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._mark_base(trainable=not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._mark_base(trainable=enabled)

    def _mark_base(self, *, trainable: bool) -> None:
        # transformers' own `set_adapter` knows layers only, so the layers look after `train_base`, the first for all.
        first = next((layer for _, layer in tuner_layers(self._model[0]) if isinstance(layer, TunerLayer)), None)
        if first is self:
            mark_base(self._model[0], self.active_adapters if trainable else [])

    def place(self, adapter_name: str, *, inference_mode: bool) -> None:
        """Bring a fresh adapter to the device and dtype of the base model and settle whether it trains."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=inference_mode)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # The weights of a quantised module are packed; the norms beside it keep the dtype in which it computes.
        for module in [base_layer, *self._near[0].modules()]:
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
        """Nothing is ever merged."""

    def detach(self) -> None:
        """Leave the base model as it was."""
        raise NotImplementedError

    def forget(self, adapter_name: str) -> None:
        """Remove an adapter without choosing another active one, and the layer itself if it was the last."""
        for name in self.adapter_layer_names:
            if adapter_name in (container := getattr(self, name)):
                del container[adapter_name]
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
        if not self._all_available_adapter_names():
            self.detach()

    def run_active(self, units: nn.ModuleDict, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        """The active units of `units` that act at `site`, in the order of activation, or each row through its own."""
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
        # `get_layer_status` shows what stands before the first bracket.
        return f"{self.method.name}.{super().__repr__()}"


class TaskTunerLayer(TunerLayer):
    """The modules of one method in one block, of every adapter.

    It is a child of the block, which is not wrapped: the names of the base weights, the block's class and its
    attributes stay. `<prefix>units.<adapter name>` are the units; `<prefix>shared.<adapter name>` is what the blocks
    of a stack share, registered in the first adapted block only and so counted, saved and trained once.

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
        if not hasattr(cls, "method"):  # a base of the layers of several methods
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
            shared: what an earlier block of the stack holds for this adapter, or None in the first.

        Returns:
            What this adapter shares over the blocks, for the next block.
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
        """Install the hooks that a fresh unit asks for."""
        self.attachment.require(unit.sites, unit.needs)

    def detach(self) -> None:
        """Take the hooks off the block and the layer out of it."""
        self.attachment.remove()
        delattr(self.base_layer, self.method.name)

    # The runner of `Attachment`

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
        raise UnsupportedError("a task layer is not called: its hooks act when its block is.")


def entry(units: nn.ModuleDict, name: str, default: nn.Module) -> nn.Module:
    """`nn.ModuleDict` has no `get`."""
    return units[name] if name in units else default  # noqa: SIM401


def remove_adapter_name(key: str, prefix: str, adapter_name: str) -> str:
    """`...pal_units.rte.query.weight` -> `...pal_units.query.weight`.

    `base_layer`, where another method has wrapped a module around ours, is left out: a file names the base model's
    modules.
    """
    match = re.search(rf"(?:^|\.){re.escape(prefix)}[a-z]+(\.{re.escape(adapter_name)})(?=\.|$)", key)
    if match is None:
        return key
    path = [part for part in key[: match.start()].split(".") if part != "base_layer"]
    return ".".join(path) + key[match.start() : match.start(1)] + key[match.end() :]


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All layers of PEFT methods in a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Module) and isinstance(module, BaseTunerLayer):
            yield name, module
