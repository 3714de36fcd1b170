"""The layers that hold a target's combination in PEFT: behind a module, in the place of a norm, and in a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.blocks.sites import Block
from pal_adapters.errors import UnsupportedError
from pal_adapters.fusion.units import CombinedUnit, NormCopies, SourceGroup
from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.layer import TaskTunerLayer, TunerLayer, tuner_layers
from pal_adapters.methods.houlsby.peft_layers import HoulsbyNorm
from pal_adapters.nn.unit import UnitInputs

from .sources import innermost

VALUE = "value"
_NONE = Method(name="fusion", build=lambda config, block: None, unmergeable="")


class _Names:
    """Mixed into the layers: one set of classes serves all methods, whose names the containers carry."""

    if TYPE_CHECKING:
        adapter_layer_names: tuple[str, ...]
        method: Any

    def _belong_to(self, method: Method) -> None:
        self.method = method
        self.adapter_layer_names = (f"{method.name}_units", f"{method.name}_shared")

    def add(
        self,
        adapter_name: str,
        unit: CombinedUnit,
        groups: Sequence[SourceGroup],
        shared: nn.Module | None,
        *,
        inference_mode: bool,
    ) -> None:
        """Add a target.

        Args:
            groups: its sources here. Those that another target holds already are taken over from it.
            shared: coefficients that other places share and that are registered here.
        """
        assert isinstance(self, TunerLayer)
        units, registered = (getattr(self, name) for name in self.adapter_layer_names)
        known = next((other.groups for other in units.values() if _same(other.groups, groups)), None)
        if shared is not None:
            registered[adapter_name] = shared.train(self.training)
        units[adapter_name] = unit.train(self.training)
        # `place` brings an adapter to the dtype of the base model, and the host only parameters back to float32. Fixed
        # coefficients, temperatures and sources keep theirs.
        kept = [(m, n, b) for m in unit.mixers.modules() for n, b in m.named_buffers(recurse=False)]
        self.place(adapter_name, inference_mode=inference_mode)
        device = self._get_base_layer_device_and_dtype(innermost(self._near[0]))[0]
        for module, name, buffer in kept:
            setattr(module, name, buffer.to(device))
        unit.groups = nn.ModuleList(groups).to(device).train(self.training) if known is None else known


def _same(one: Iterable[nn.Module], other: Iterable[nn.Module]) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    if type(a) is not type(b) or list(mine) != list(theirs) or a.rows != b.rows:
        return False
    if getattr(a, "activations", None) != getattr(b, "activations", None):
        return False
    # Task modules share weights that only one block registers, and have settings of their own.
    if getattr(a, "_units", None):
        return False
    return all(
        value.shape == theirs[name].shape and torch.equal(value.cpu(), theirs[name].cpu())
        for name, value in mine.items()
    )


class FusionModuleLayer(_Names, TunerLayer):
    """What the targets add behind a module: a child of it, as a Houlsby bottleneck is.

    Args:
        model: the base model.
        target: the module.
        method: the method of the targets.
        width: `d`, the width of the module's output.
    """

    def __init__(self, model: nn.Module, target: nn.Module, method: Method, width: int) -> None:
        self._belong_to(method)
        super().__init__(model, width, innermost(target))
        self._target = (target,)
        # In front of other hooks: transformers 5 records what modules return in hooks of its own.
        self._handle = target.register_forward_hook(self._behind, prepend=True, with_kwargs=True)

    @property
    def base_layer(self) -> nn.Module:
        return self._target[0]

    @property
    def units(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def detach(self) -> None:
        self._handle.remove()
        delattr(self.base_layer, self.method.name)

    def _behind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        names = self.active_adapters if self.plan is None else self.plan.names
        if self.disable_adapters or not any(name in self.units for name in names):
            return None
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        value = output[0] if isinstance(output, tuple) else output
        if value.dim() == 2 and self.plan is not None:  # OPT runs its feed-forward part on all tokens in one dimension
            rows = len((self.plan.origin or self.plan).names)
            x = x.view(rows, -1, *x.shape[1:])
        new = self.run_active(self.units, VALUE, value, UnitInputs(x=x, batch=value.shape[0]))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("a combination is not called: its hook acts when its module is.")


class FusionNormLayer(_Names, HoulsbyNorm):
    """Takes the place of a layer norm of which sources have copies.

    Args:
        model: the base model.
        base_layer: the norm.
        parent: the module that holds it.
        name: its name there.
        method: the method of the targets.
    """

    def __init__(self, model: nn.Module, base_layer: nn.Module, parent: nn.Module, name: str, method: Method) -> None:
        self._belong_to(method)
        super().__init__(model, base_layer, parent, name)
        if isinstance(base_layer, HoulsbyNorm):  # of a source on the model, whose place is inside now
            base_layer._place = (self, "base_layer")

    def detach(self) -> None:
        super().detach()
        if isinstance(self.base_layer, HoulsbyNorm):
            self.base_layer._place = self._place

    @property
    def units(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters if self.plan is None else self.plan.for_batch(x.shape[0]).names
        if self.disable_adapters or not any(name in self.units for name in names):
            return self.base_layer(x, *args, **kwargs)
        if self.plan is None:
            return self._norm(x, names)
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(name, []).append(row)
        new = torch.empty_like(x)
        for name, rows in groups.items():
            index = torch.tensor(rows, device=x.device)
            new = new.index_copy(0, index, self._norm(x.index_select(0, index), [name]))
        return new

    def _norm(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The norm with what the targets `names` add to its weights."""
        norm = innermost(self.base_layer)
        weights: dict[str, Tensor] = dict(norm.named_parameters(recurse=False))
        for name in names:
            if name in self.units:
                unit = self.units[name]
                assert isinstance(unit, CombinedUnit)
                assert isinstance(unit.groups[0], NormCopies)
                weights = unit.groups[0].weights(unit.omega(VALUE), weights)
        dtype = next(iter(weights.values())).dtype
        if isinstance(norm, nn.LayerNorm):
            bias = weights.get("bias")
            return F.layer_norm(x.to(dtype), norm.normalized_shape, weights["weight"], bias, norm.eps).to(x.dtype)
        return torch.func.functional_call(norm, weights, (x.to(dtype),)).to(x.dtype)


class FusionBlockLayer(_Names, TaskTunerLayer):
    """What the targets make of task modules, such as PALs, in one block.

    Args:
        model: the base model.
        block: the block.
        method: the method of the targets.
    """

    method = _NONE  # type: ignore[misc]

    def __init__(self, model: nn.Module, block: Block, method: Method) -> None:
        self._belong_to(method)
        super().__init__(model, block)

    def add(self, adapter_name: str, unit: CombinedUnit, *args: Any, **kwargs: Any) -> None:
        super().add(adapter_name, unit, *args, **kwargs)
        self.attachment.require(unit.sites, unit.needs)


FusionLayer = FusionModuleLayer | FusionNormLayer | FusionBlockLayer


def combinations(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, FusionLayer, CombinedUnit]]:
    """The combinations of a target, or of the active targets, with the names of their modules."""
    for path, layer in tuner_layers(model):
        if not isinstance(layer, FusionLayer):
            continue
        names = [adapter] if adapter is not None else [] if layer.disable_adapters else layer.active_adapters
        for name in names:
            if name in layer.units:
                place = path if isinstance(layer, FusionNormLayer) else path.rpartition(".")[0]
                unit = layer.units[name]
                assert isinstance(unit, CombinedUnit)
                yield place, layer, unit


def active_combinations(model: nn.Module) -> list[str]:
    """The targets that act now."""
    layers = [layer for _, layer in tuner_layers(model) if isinstance(layer, FusionLayer)]
    names = [n for layer in layers if not layer.disable_adapters for n in layer.active_adapters if n in layer.units]
    return list(dict.fromkeys(names))
