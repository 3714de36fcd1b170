"""The layer that a block of a model gets through PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..units import TaskUnit, UnitInputs
from .attach import Attachment
from .batch import RowPlan, run_rows, run_unit
from .methods import Method
from .sites import Block


class RowRouting:
    """Mixed into tuner layers: `plan` names the adapter of each row while `adapter_names` is in force."""

    plan: RowPlan | None = None


class TaskTunerLayer(nn.Module, BaseTunerLayer, RowRouting):
    """The modules of one method in one block, of every adapter.

    It is a child of the block, which is not wrapped: the names of the base weights, the block's class and its
    attributes stay. `<prefix>units.<adapter name>` are the units; `<prefix>shared.<adapter name>` is what the blocks
    of a stack share, registered in the first adapted block only and so counted, saved and trained once.

    Args:
        model: the base model.
        block: the block.
    """

    method: ClassVar[Method]
    prefix: ClassVar[str]

    def __init__(self, model: nn.Module, block: Block) -> None:
        super().__init__()
        self._block = (block,)
        self.in_features = self.out_features = block.width
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.attachment = Attachment(model, block, self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
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
        self.units[adapter_name] = unit
        self.attachment.require(unit.sites, unit.needs)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=config.inference_mode)
        return shared

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # The weights of a quantised block are packed; its norms keep the dtype in which it computes.
        for module in base_layer.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1 and weight.is_floating_point():
                return weight.device, weight.dtype
        return None, None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UnsupportedError(f"{self.method.name} cannot be merged: {self.method.unmergeable}")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def detach(self) -> None:
        """Take the hooks off the block and the layer out of it."""
        self.attachment.remove()
        delattr(self.base_layer, self.method.name)

    # The runner of `Attachment`

    def _names(self, value: Tensor | None = None) -> Sequence[str]:
        return self.active_adapters if self.plan is None else self.plan.names

    def is_active(self, site: str) -> bool:
        if self.disable_adapters:
            return False
        return any(name in self.units and site in self.units[name].sites for name in self._names())  # type: ignore[operator]

    def keeps_inputs(self) -> bool:
        return False

    def run(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        if self.plan is not None:
            plan = self.plan.for_batch(value.shape[0])
            return run_rows(self.units, plan, site, value, inputs._replace(slot=("rows",)))  # type: ignore[arg-type]
        for name in self.active_adapters:
            if name in self.units:
                unit = self.units[name]
                assert isinstance(unit, TaskUnit)
                if site in unit.sites:
                    value = run_unit(unit, site, value, inputs._replace(slot=(name,)))
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("a task layer is not called: its hooks act when its block is.")

    def __repr__(self) -> str:
        return f"{self.method.name}.{super().__repr__()}"


def remove_adapter_name(key: str, prefix: str, adapter_name: str) -> str:
    """`...pal_units.rte.query.weight` -> `...pal_units.query.weight`."""
    pattern = rf"((?:^|\.){re.escape(prefix)}[a-z]+)\.{re.escape(adapter_name)}(?=\.|$)"
    return re.sub(pattern, r"\1", key, count=1)


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All layers of PEFT methods in a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
