"""The PEFT layers of Houlsby adapters: bottlenecks after a module, and copies of a layer norm."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.blocks import signatures
from pal_adapters.blocks.layouts import from_tokens, to_tokens
from pal_adapters.blocks.placement import require_at_hand
from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.rows import RowPlan
from pal_adapters.hosts.peft.layer import TunerLayer, entry
from pal_adapters.nn.functional import batches_tasks
from pal_adapters.nn.unit import UnitInputs

from .config import HOULSBY
from .layer import HoulsbyBottleneck

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs")  # fmt: skip


class HoulsbyTunerLayer(TunerLayer):
    """Base of both layers."""

    method = HOULSBY
    container: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = (cls.container,)


class HoulsbyLayer(HoulsbyTunerLayer):
    """The bottlenecks after a module, one per adapter.

    It is a child of the module rather than a wrapper: in pre-LN models that module is the whole attention, whose
    linear layers keep their names, so that LoRA can still target them.

    Args:
        model: the base model.
        target: the module after which a bottleneck is added.
        width: `d`, the width of that output.
        near: the module whose device and dtype a new adapter takes.
        layout: of the module's output, see `BlockSites.layout`.
    """

    container = "houlsby_units"

    def __init__(self, model: nn.Module, target: nn.Module, width: int, near: nn.Module, layout: str) -> None:
        super().__init__(model, width, near)
        self._layout = layout
        self._target = (target,)
        # Before other hooks: transformers 5 records the outputs of modules in its own hooks.
        self._handle = target.register_forward_hook(self._behind, prepend=True)

    @property
    def base_layer(self) -> nn.Module:
        return self._target[0]

    @property
    def units(self) -> nn.ModuleDict:
        units = self.houlsby_units
        assert isinstance(units, nn.ModuleDict)
        return units

    def add_unit(self, adapter_name: str, unit: HoulsbyBottleneck, *, inference_mode: bool) -> None:
        """Add an adapter's bottleneck."""
        self.units[adapter_name] = unit.train(self.training)
        self.place(adapter_name, inference_mode=inference_mode)

    def detach(self) -> None:
        self._handle.remove()
        delattr(self.base_layer, HOULSBY.name)

    def _behind(self, module: nn.Module, args: Any, output: Any) -> Any:
        names = self.active_adapters if self.plan is None else self.plan.names
        if self.disable_adapters or not any(name in self.units for name in names):
            return None
        old = signatures.first_of(output)
        value = self.run_active(self.units, "value", to_tokens(old, self._layout), UnitInputs())
        return signatures.with_first(output, from_tokens(value, old, self._layout))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("a Houlsby layer cannot be called: its hook runs when its module is called.")


class HoulsbyNorm(HoulsbyTunerLayer):
    """Replaces a layer norm and holds a copy of it for each adapter.

    The norm is available as `base_layer`, and its attributes on the wrapper.

    Args:
        model: the base model.
        base_layer: the norm.
        parent: its parent module.
        name: its name there.
        layout: of what it normalizes, see `BlockSites.layout`.
    """

    container = "houlsby_norms"

    def __init__(
        self, model: nn.Module, base_layer: nn.Module, parent: nn.Module, name: str, layout: str = "tokens"
    ) -> None:
        super().__init__(model, norm_width(base_layer), base_layer)
        self._tokens_first = layout == "tokens_first"
        self.base_layer = base_layer
        self._place = (parent, name)
        self._swap_hooks()

    def _swap_hooks(self) -> None:
        # Hooks on the norm, such as a PAL's, must run whichever copy is used, and must not be copied.
        for name in _HOOKS:
            mine, theirs = self.__dict__[name], self.base_layer.__dict__[name]
            self.__dict__[name], self.base_layer.__dict__[name] = theirs, mine

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    @property
    def units(self) -> nn.ModuleDict:
        norms = self.houlsby_norms
        assert isinstance(norms, nn.ModuleDict)
        return norms

    def add_copy(self, adapter_name: str, *, inference_mode: bool) -> None:
        """Add an adapter's copy of the norm."""
        require_at_hand(self.get_base_layer(), "each Houlsby adapter copies")
        self.units[adapter_name] = copy.deepcopy(self.get_base_layer())
        self.place(adapter_name, inference_mode=inference_mode)

    def detach(self) -> None:
        parent, name = self._place
        self._swap_hooks()
        setattr(parent, name, self.base_layer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if self.plan is not None:
            if self._tokens_first:
                return self._rows(x.transpose(0, 1), self.plan.for_batch(x.shape[1])).transpose(0, 1)
            return self._rows(x, self.plan.for_batch(x.shape[0]))
        active = [name for name in self.active_adapters if name in self.units]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise UnsupportedError(
                f"adapters {active} are active together and each has its own layer norms: activate one, or train them "
                "with train_layernorm=False."
            )
        norm = self.units[active[0]]
        return norm(x.to(norm.weight.dtype), *args, **kwargs).to(x.dtype)  # type: ignore[arg-type]

    def _rows(self, x: Tensor, plan: RowPlan) -> Tensor:
        base = self.get_base_layer()
        norms = [entry(self.units, name, base) for name in plan.names]
        if all(norm is base for norm in norms):
            return base(x)
        if all(norm is norms[0] for norm in norms):
            return norms[0](x.to(norms[0].weight.dtype)).to(x.dtype)  # type: ignore[arg-type]
        # The base norm may have a lower precision than the adapters' copies.
        dtype = next(norm.weight.dtype for norm in norms if norm is not base)
        wide = x.to(dtype)  # type: ignore[arg-type]
        if type(base) is nn.LayerNorm:  # subclasses compute something else: Nemotron's adds one to its weight
            if plan.input is None and not batches_tasks(x.device):
                return self._by_task(wide, plan).to(x.dtype)
            numbers = plan.numbers(x.device)
            shape = (numbers.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
            y = F.layer_norm(wide, base.normalized_shape, eps=base.eps)
            for key, join in (("weight", torch.mul), ("bias", torch.add)):
                if getattr(base, key) is not None:
                    together = torch.stack([getattr(norm, key).to(dtype) for norm in norms])
                    y = join(y, together.index_select(0, numbers).view(shape))
            return y.to(x.dtype)
        # Not with `torch.func`, which swaps the weights of the base norm while other threads use it.
        new = wide
        for norm in dict.fromkeys(norms):
            own = [name for name, other in zip(plan.names, norms, strict=True) if other is norm]
            if plan.input is not None:
                is_own = torch.stack([plan.input == plan.names.index(name) for name in own]).any(0)
                is_own = is_own.view(-1, *(1,) * (wide.dim() - 1))
                new = torch.where(is_own, norm(wide.to(norm.weight.dtype)).to(dtype), new)  # type: ignore[arg-type]
                continue
            rows = plan.rows_of(own, x.device)
            part = wide.index_select(0, rows).to(norm.weight.dtype)  # type: ignore[arg-type]
            new = new.index_copy(0, rows, norm(part).to(dtype))
        return new.to(x.dtype)

    def _by_task(self, x: Tensor, plan: RowPlan) -> Tensor:
        """Each task's examples through its copy: unlike one norm and a product, keeps no more than a single task."""
        base: Any = self.get_base_layer()
        (group,) = plan.groups(dict.fromkeys(plan.names, self.container), x.device, by_task=True)
        assert group.counts is not None  # more than one task
        ordered = x if group.rows is None else x.index_select(0, group.rows)
        norms = [entry(self.units, name, base) for name in group.names]
        y = torch.cat(
            [
                F.layer_norm(part, base.normalized_shape, _as(norm.weight, x), _as(norm.bias, x), base.eps)
                for part, norm in zip(ordered.split(group.counts), norms, strict=True)
            ]
        )
        return y if group.back is None else y.index_select(0, group.back)


def _as(weight: Any, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype)


def is_scaled_norm(module: nn.Module) -> bool:
    """Whether a module is any kind of layer norm or RMS norm with a scale, which an adapter may copy."""
    weight = getattr(module, "weight", None)
    named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def norm_width(norm: nn.Module) -> int:
    """The width of a norm."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0])


def output_width(module: nn.Module) -> int | None:
    """The width of a module's output, or None if unknown."""
    if is_scaled_norm(module):
        return norm_width(module)
    widths = (getattr(module, attribute, None) for attribute in ("out_features", "nf", "embedding_dim"))
    return next((width for width in widths if isinstance(width, int)), None)
