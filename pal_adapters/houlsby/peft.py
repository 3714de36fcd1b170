"""Houlsby bottlenecks in PEFT: the config, the layers that wrap a branch and a norm, and the tuner."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from ..errors import ConfigError, SiteError, UnsupportedError
from ..hosts.batch import RowPlan, run_rows, run_unit
from ..hosts.methods import Method
from ..hosts.peft import TaskTuner, register
from ..hosts.peft_config import TaskPeftConfig, choose_blocks
from ..hosts.peft_layer import RowRouting, tuner_layers
from ..hosts.sites import Block, iter_blocks, resolve
from ..units import TaskUnit, UnitInputs
from .config import HOULSBY, validate_houlsby
from .layer import Bottleneck


@dataclass
class HoulsbyPeftConfig(TaskPeftConfig):
    r"""The bottlenecks of Houlsby et al.: `get_peft_model(model, HoulsbyPeftConfig(task_type="SEQ_CLS"))`.

    $$A(u) = u + W_2 \, g(W_1 u + b_1) + b_2, \qquad h_1 = LN_1(x + A_1(o_1)), \qquad y = LN_2(h_1 + A_2(o_2))$$

    sequential, behind both branches of a block, before the residual sum; see `pal_adapters.houlsby.layer.Bottleneck`. The
    base model stays frozen, its pooler too, but every layer norm gets a copy that is trained and stored with the adapter.

    Source: Houlsby et al., ICML 2019. Differs from the paper in: `W_2` starts at zero unless `init_weights=False`. In
    models that drop out with a function (BART, T5's attention aside) the bottleneck stands before that dropout.

    Args:
        target_modules: blocks as in the other configs, or modules whose output gets a bottleneck, as for LoRA
            (`["attention.output.dense", "output.dense"]`); None finds both branches of every block.
        hidden_size: `m`.
        activation: `"gelu_new"`, the tanh approximation of the reference code, or `"gelu"`, `"relu"`, `"silu"`, `"tanh"`.
        init_std: standard deviation of the truncated normal, 1e-2 in the paper.
        train_layernorm: train a copy of every layer norm; norms outside the blocks are included if all blocks are adapted.
        init_weights: True (`W_2 = 0`, nothing changes at start) or False (both truncated normal, the paper's).

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = HOULSBY

    hidden_size: int = field(default=64, metadata={"help": "Bottleneck width."})
    activation: str = field(default="gelu_new", metadata={"help": "Activation inside the bottleneck."})
    init_std: float = field(default=1e-2, metadata={"help": "Standard deviation of the truncated normal."})
    train_layernorm: bool = field(default=True, metadata={"help": "Train a copy of every layer norm."})

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_houlsby(self)


class HoulsbyTunerLayer(nn.Module, BaseTunerLayer, RowRouting):
    """Wraps a module of the base model, which stays reachable as `base_layer`, its attributes on the wrapper."""

    container: ClassVar[str]

    def __init__(self, base_layer: nn.Module, parent: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._place = (parent, name)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        setattr(self, self.container, nn.ModuleDict())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = (cls.container,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UnsupportedError(f"houlsby cannot be merged: {HOULSBY.unmergeable}")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def detach(self) -> None:
        """Put the base module back."""
        parent, name = self._place
        setattr(parent, name, self.base_layer)

    def _added(self, adapter_name: str, inference_mode: bool) -> None:
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=inference_mode)

    def _current(self, batch: int) -> RowPlan | None:
        return None if self.plan is None else self.plan.for_batch(batch)


class HoulsbyLayer(HoulsbyTunerLayer):
    """A branch of a block with a bottleneck behind it, one for each adapter."""

    container = "houlsby_units"

    def __init__(self, base_layer: nn.Module, parent: nn.Module, name: str, width: int, near: nn.Module) -> None:
        super().__init__(base_layer, parent, name)
        self.in_features = self.out_features = width
        self._near = (near,)

    def update_layer(self, adapter_name: str, config: HoulsbyPeftConfig) -> None:
        """Add an adapter's bottleneck."""
        unit = Bottleneck(
            self.in_features, config.hidden_size, activation=config.activation, init_std=config.init_std
        )
        unit.reset_parameters(identity=config.init_weights)
        unit.train(self.training)
        self.houlsby_units[adapter_name] = unit
        self._added(adapter_name, config.inference_mode)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # A dropout module has no weights and a quantised one packed ones: the block's norms tell.
        for module in [base_layer, *self._near[0].modules()]:
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.is_floating_point() and (weight.dim() == 1 or module is base_layer):
                return weight.device, weight.dtype
        return None, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        value = output[0] if isinstance(output, tuple) else output
        plan = self._current(value.shape[0])
        if plan is not None:
            value = run_rows(self.houlsby_units, plan, "value", value, UnitInputs())  # type: ignore[arg-type]
        else:
            for name in self.active_adapters:
                if name in self.houlsby_units:
                    unit = self.houlsby_units[name]
                    assert isinstance(unit, TaskUnit)
                    value = run_unit(unit, "value", value, UnitInputs())
        return (value, *output[1:]) if isinstance(output, tuple) else value


class HoulsbyNorm(HoulsbyTunerLayer):
    """A layer norm of the base model with a copy for each adapter, which takes its place."""

    container = "houlsby_norms"

    def __init__(self, base_layer: nn.Module, parent: nn.Module, name: str) -> None:
        super().__init__(base_layer, parent, name)
        self.in_features = self.out_features = int(base_layer.weight.shape[0])  # type: ignore[union-attr]

    def update_layer(self, adapter_name: str, config: HoulsbyPeftConfig) -> None:
        """Add an adapter's copy of the norm."""
        self.houlsby_norms[adapter_name] = copy.deepcopy(self.get_base_layer())
        self._added(adapter_name, config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        plan = self._current(x.shape[0])
        if plan is not None:
            return self._rows(x, plan.names)
        active = [name for name in self.active_adapters if name in self.houlsby_norms]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise UnsupportedError(
                f"adapters {active} are active together and each has its own layer norms: activate one, or train them with "
                "train_layernorm=False."
            )
        norm = self.houlsby_norms[active[0]]
        return norm(x.to(norm.weight.dtype), *args, **kwargs).to(x.dtype)  # type: ignore[arg-type]

    def _rows(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base = self.get_base_layer()
        norms = [self.houlsby_norms[name] if name in self.houlsby_norms else base for name in names]
        if all(norm is norms[0] for norm in norms):
            return norms[0](x.to(norms[0].weight.dtype)).to(x.dtype)  # type: ignore[arg-type]
        weights = {
            key: torch.stack([getattr(norm, key) for norm in norms]) for key, _ in base.named_parameters(recurse=False)
        }
        dtype = next(iter(weights.values())).dtype
        call = torch.func.vmap(lambda w, row: torch.func.functional_call(base, w, (row,)))
        return call(weights, x.to(dtype)).to(x.dtype)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm or an RMS norm with a scale."""
    weight = getattr(module, "weight", None)
    named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def _width(module: nn.Module) -> int:
    for attribute in ("out_features", "nf"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    raise SiteError(
        f"the output width of {type(module).__name__} is not known: target modules inside a block, or linear modules."
    )


class HoulsbyModel(TaskTuner):
    """The tuner of Houlsby bottlenecks."""

    method = HOULSBY
    tuner_layer_cls = HoulsbyTunerLayer

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: HoulsbyPeftConfig, model_config: dict[str, Any]
    ) -> HoulsbyPeftConfig:
        blocks = list(iter_blocks(self.model, peft_config.sites))
        self._targets: dict[str, tuple[int | None, nn.Module]] = {}
        self._excluded: set[str] = set()
        chosen = blocks
        if peft_config.target_modules is None or self._names_blocks(peft_config, blocks):
            if not blocks:
                from ..hosts.sites import find_blocks

                find_blocks(self.model, peft_config.sites)
            chosen, self._excluded = choose_blocks(peft_config, blocks)
            for block in chosen:
                for path in (block.sites.attention_output, block.sites.ffn_output):
                    self._targets[self._name(block, path)] = (block.width, block.module)
        else:
            self._take_modules(peft_config, blocks)
            chosen = [b for b in blocks if any(name.startswith(f"{b.name}.") for name in self._targets)]
        if peft_config.train_layernorm:
            for name in self._norms(blocks, chosen):
                self._targets.setdefault(name, (None, self.model))
        return peft_config

    @staticmethod
    def _names_blocks(config: HoulsbyPeftConfig, blocks: list[Block]) -> bool:
        try:
            choose_blocks(config, blocks) if blocks else None
        except ConfigError:
            return False
        return bool(blocks)

    def _name(self, block: Block, path: str) -> str:
        module = resolve(block.module, path)
        inside = next(name for name, m in block.module.named_modules() if m is module)
        return f"{block.name}.{inside}"

    def _take_modules(self, config: HoulsbyPeftConfig, blocks: list[Block]) -> None:
        inner = [f"{name}." for name, _ in tuner_layers(self.model)]
        for name, module in self.model.named_modules():
            if not name or any(name.startswith(prefix) for prefix in inner):
                continue
            found = check_target_module_exists(config, name)
            if found:
                block = next((b for b in blocks if name.startswith(f"{b.name}.")), None)
                near = module if block is None else block.module
                own = isinstance(getattr(module, "out_features", getattr(module, "nf", None)), int)
                self._targets[name] = (_width(module) if own or block is None else block.width, near)

    def _norms(self, blocks: list[Block], chosen: list[Block]) -> Iterator[str]:
        base = getattr(self.model, "base_model", self.model)
        prefix = next((f"{n}." if n else "" for n, m in self.model.named_modules() if m is base), "")
        left = [f"{b.name}." for b in blocks if b not in chosen]
        for name, module in base.named_modules():
            name = prefix + name
            if not is_norm(module) and not isinstance(module, HoulsbyNorm):
                continue
            if any(name.startswith(p) for p in left) or ".houlsby_norms." in name or name.endswith(".base_layer"):
                continue
            if left and not any(name.startswith(f"{b.name}.") for b in blocks):
                continue
            yield name

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key in self._targets:
            return True
        return super()._check_target_module_exists(peft_config, key) if key in self._excluded else False

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: HoulsbyPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, HoulsbyTunerLayer):
            width, near = self._targets[current_key]
            if width is None:
                layer = HoulsbyNorm(target, parent, target_name)
            else:
                layer = HoulsbyLayer(target, parent, target_name, width, near)
            layer.train(target.training)
            setattr(parent, target_name, layer)
        layer.update_layer(adapter_name, peft_config)  # type: ignore[operator]
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for _, layer in list(tuner_layers(self.model)):
            if isinstance(layer, HoulsbyTunerLayer):
                layer.detach()
        return super()._unload_and_optionally_merge(False, *args, **kwargs)


register(HOULSBY, HoulsbyPeftConfig, HoulsbyModel)
