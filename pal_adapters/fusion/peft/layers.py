"""The PEFT layers that hold combinations: at the output of a module, in place of a norm, and in a block."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.blocks.sites import Block
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.fusion.units import CombinedUnit, NormCopies, SourceGroup
from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.layer import TaskTunerLayer, TunerLayer, tuner_layers
from pal_adapters.methods.houlsby.peft_layers import HoulsbyNorm
from pal_adapters.nn.unit import UnitInputs

from .sources import innermost

VALUE = "value"
_NONE = Method(name="fusion", build=lambda config, block: None, unmergeable="")


class _Names:
    """Mixin: the same layer classes serve all methods, whose names are in those of the containers."""

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
        """Add a combination.

        Args:
            groups: its sources at this place; reused from another combination if that has the same ones.
            shared: coefficients shared with other places that are registered here.
        """
        assert isinstance(self, TunerLayer)
        units, registered = (getattr(self, name) for name in self.adapter_layer_names)
        known = next((other.groups for other in units.values() if _same(other.groups, groups)), None)
        if shared is not None:
            registered[adapter_name] = shared.train(self.training)
        units[adapter_name] = unit.train(self.training)
        # `place` casts an adapter to the base model's dtype, and PEFT casts only parameters back to float32. Buffers
        # (fixed coefficients, temperatures, sources) keep their dtype.
        kept = [(m, n, b) for m in unit.mixers.modules() for n, b in m.named_buffers(recurse=False)]
        self.place(adapter_name, inference_mode=inference_mode)
        device = self._get_base_layer_device_and_dtype(innermost(self._near[0]))[0]
        for module, name, buffer in kept:
            setattr(module, name, buffer.to(device))
        unit.groups = nn.ModuleList(groups).to(device).train(self.training) if known is None else known


def _same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(a.equals(b) for a, b in zip(one, other, strict=True))


class FusionModuleLayer(_Names, TunerLayer):
    """The combinations at the output of a module: a child of the module, like a Houlsby bottleneck.

    Args:
        model: the base model.
        target: the module.
        method: the method of the combinations.
        width: `d`, the width of the module's output.
    """

    def __init__(self, model: nn.Module, target: nn.Module, method: Method, width: int) -> None:
        self._belong_to(method)
        super().__init__(model, width, innermost(target))
        self._target = (target,)
        # Ahead of other hooks: transformers 5 records the outputs of modules in hooks of its own.
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
        if value.dim() == 2 and self.plan is not None:  # OPT flattens examples and tokens in its feed-forward part
            rows = (self.plan.origin or self.plan).numbers(value.device).shape[0]
            x = x.view(rows, -1, *x.shape[1:])
        new = self.run_active(self.units, VALUE, value, UnitInputs(x=x, batch=value.shape[0]))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("a combination is not called directly: its hook runs when its module is called.")


class FusionNormLayer(_Names, HoulsbyNorm):
    """Replaces a layer norm of which sources have copies.

    Args:
        model: the base model.
        base_layer: the norm.
        parent: the module that contains it.
        name: its name in `parent`.
        method: the method of the combinations.
    """

    def __init__(self, model: nn.Module, base_layer: nn.Module, parent: nn.Module, name: str, method: Method) -> None:
        self._belong_to(method)
        super().__init__(model, base_layer, parent, name)
        if isinstance(base_layer, HoulsbyNorm):  # of a source on the model, which is now nested inside this layer
            base_layer._place = (self, "base_layer")

    def detach(self) -> None:
        super().detach()
        if isinstance(self.base_layer, HoulsbyNorm):
            self.base_layer._place = self._place

    @property
    def units(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = None if self.plan is None else self.plan.for_batch(x.shape[0])
        names = self.active_adapters if plan is None else plan.names
        if self.disable_adapters or not any(name in self.units for name in names):
            return self.base_layer(x, *args, **kwargs)
        if plan is None:
            return self._norm(x, names)
        new = torch.empty_like(x)
        for name in plan.names:
            rows = plan.rows_of([name], x.device)
            new = new.index_copy(0, rows, self._norm(x.index_select(0, rows), [name]))
        return new

    def _norm(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The norm with the weights that the combinations `names` give it."""
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
        # Not `torch.func.functional_call`, which swaps the weights of the one norm that other threads are using.
        changed = copy.copy(norm)
        changed.__dict__["_parameters"] = weights
        return changed(x.to(dtype)).to(x.dtype)


class FusionBlockLayer(_Names, TaskTunerLayer):
    """The combinations of task modules, such as PALs, in one block.

    Args:
        model: the base model.
        block: the block.
        method: the method of the combinations.
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
    """The units of one combination, or of the active ones, with the names of their modules."""
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
    """The names of the combinations that are active now."""
    layers = [layer for _, layer in tuner_layers(model) if isinstance(layer, FusionLayer)]
    names = [n for layer in layers if not layer.disable_adapters for n in layer.active_adapters if n in layer.units]
    return list(dict.fromkeys(names))


def require_combination_name(argument: str, combination: Any) -> None:
    """Raise `ConfigError` unless a combination is given by name, or None for the active one."""
    if combination is not None and not isinstance(combination, str):
        listed = isinstance(combination, (list, tuple, set))
        names = ", ".join(map(repr, combination)) if listed else "..."
        raise ConfigError(
            f"{argument}={combination!r} is not allowed: pass the name of the adapter that combines the sources, made "
            f"with ScaLearnPeftConfig(adapters=[{names}]), or None for the active one."
        )
