"""Houlsby bottlenecks in PEFT: the config, the layers that wrap a branch and a norm, and the tuner."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pal_adapters.blocks.sites import Block, find_blocks, iter_blocks, resolve
from pal_adapters.errors import ConfigError, SiteError, UnsupportedError
from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.config import TaskPeftConfig, choose_blocks, names_blocks
from pal_adapters.hosts.peft.layer import TunerLayer, entry
from pal_adapters.hosts.peft.tuner import EXCLUDED, TaskTuner, matching_modules, register
from pal_adapters.nn.unit import UnitInputs

from .config import HOULSBY, validate_houlsby
from .layer import Bottleneck


@dataclass
class HoulsbyPeftConfig(TaskPeftConfig):
    r"""The bottlenecks of Houlsby et al.: `get_peft_model(model, HoulsbyPeftConfig(task_type="SEQ_CLS"))`.

    $$A(u) = u + W_2 \, g(W_1 u + b_1) + b_2, \qquad h_1 = LN_1(x + A_1(o_1)), \qquad y = LN_2(h_1 + A_2(o_2))$$

    sequential, behind both branches of a block, before the residual sum; see
    `pal_adapters.methods.houlsby.layer.Bottleneck`.
    The base model stays frozen, its pooler too, but every layer norm gets a copy that is trained and stored with the
    adapter.

    Source: Houlsby et al., ICML 2019. Differs from the paper in: `W_2` starts at zero unless `init_weights=False`. In
    models that drop out with a function (BART, T5's attention aside) the bottleneck stands before that dropout.

    Args:
        target_modules: blocks as in the other configs, or modules whose output gets a bottleneck, as for LoRA
            (`["attention.output.dense", "output.dense"]`); None finds both branches of every block.
        hidden_size: `m`.
        activation: `"gelu_new"`, the tanh approximation of the reference code, or `"gelu"`, `"relu"`, `"silu"`,
            `"tanh"`.
        init_std: standard deviation of the truncated normal, 1e-2 in the paper.
        train_layernorm: train a copy of every layer norm; norms outside the blocks are included if all blocks are
            adapted.
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


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs")  # fmt: skip


class HoulsbyTunerLayer(TunerLayer):
    """Base of the two layers: bottlenecks behind a module, and copies of a norm."""

    method = HOULSBY
    container: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = (cls.container,)


class HoulsbyLayer(HoulsbyTunerLayer):
    """The bottlenecks behind a module, one for each adapter.

    It is a child of the module, which is not wrapped: in pre-LN models that module is the whole attention, whose
    linears keep their names and stay open to LoRA.

    Args:
        model: the base model.
        target: the module whose output gets a bottleneck.
        width: `d`, the width of that output.
        near: the module whose device and dtype a fresh adapter takes.
    """

    container = "houlsby_units"

    def __init__(self, model: nn.Module, target: nn.Module, width: int, near: nn.Module) -> None:
        super().__init__(model, width, near)
        self._target = (target,)
        # In front of other hooks: transformers 5 records what modules return in hooks of its own.
        self._handle = target.register_forward_hook(self._behind, prepend=True)

    @property
    def base_layer(self) -> nn.Module:
        return self._target[0]

    @property
    def units(self) -> nn.ModuleDict:
        units = self.houlsby_units
        assert isinstance(units, nn.ModuleDict)
        return units

    def update_layer(self, adapter_name: str, config: HoulsbyPeftConfig) -> None:
        """Add an adapter's bottleneck."""
        unit = Bottleneck(self.in_features, config.hidden_size, activation=config.activation, init_std=config.init_std)
        unit.reset_parameters(identity=config.init_weights)
        unit.train(self.training)
        self.units[adapter_name] = unit
        self.place(adapter_name, inference_mode=config.inference_mode)

    def detach(self) -> None:
        self._handle.remove()
        delattr(self.base_layer, HOULSBY.name)

    def _behind(self, module: nn.Module, args: Any, output: Any) -> Any:
        names = self.active_adapters if self.plan is None else self.plan.names
        if self.disable_adapters or not any(name in self.units for name in names):
            return None
        value = output[0] if isinstance(output, tuple) else output
        value = self.run_active(self.units, "value", value, UnitInputs())
        return (value, *output[1:]) if isinstance(output, tuple) else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("a Houlsby layer is not called: its hook acts when its module is.")


class HoulsbyNorm(HoulsbyTunerLayer):
    """Takes the place of a layer norm and holds a copy of it for each adapter.

    The norm stays reachable as `base_layer`, its attributes on the wrapper.

    Args:
        model: the base model.
        base_layer: the norm.
        parent: the module that holds it.
        name: its name there.
    """

    container = "houlsby_norms"

    def __init__(self, model: nn.Module, base_layer: nn.Module, parent: nn.Module, name: str) -> None:
        super().__init__(model, _norm_width(base_layer), base_layer)
        self.base_layer = base_layer
        self._place = (parent, name)
        self._swap_hooks()

    def _swap_hooks(self) -> None:
        # Hooks on the norm, such as those of a PAL beside, have to act whichever copy runs, and are not to be copied.
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

    def update_layer(self, adapter_name: str, config: HoulsbyPeftConfig) -> None:
        """Add an adapter's copy of the norm."""
        self.units[adapter_name] = copy.deepcopy(self.get_base_layer())
        self.place(adapter_name, inference_mode=config.inference_mode)

    def detach(self) -> None:
        parent, name = self._place
        self._swap_hooks()
        setattr(parent, name, self.base_layer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if self.plan is not None:
            return self._rows(x, self.plan.for_batch(x.shape[0]).names)
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

    def _rows(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base = self.get_base_layer()
        norms = [entry(self.units, name, base) for name in names]
        if all(norm is base for norm in norms):
            return base(x)
        if all(norm is norms[0] for norm in norms):
            return norms[0](x.to(norms[0].weight.dtype)).to(x.dtype)  # type: ignore[arg-type]
        # The base norm may have a narrower dtype than the adapters' copies.
        dtype = next(norm.weight.dtype for norm in norms if norm is not base)
        weights = {
            key: torch.stack([getattr(norm, key).to(dtype) for norm in norms])
            for key, _ in base.named_parameters(recurse=False)
        }
        call = torch.func.vmap(lambda w, row: torch.func.functional_call(base, w, (row,)))
        return call(weights, x.to(dtype)).to(x.dtype)  # type: ignore[arg-type]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm or an RMS norm with a scale."""
    weight = getattr(module, "weight", None)
    named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def _norm_width(norm: nn.Module) -> int:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0])


def _width(module: nn.Module) -> int | None:
    if is_norm(module):
        return _norm_width(module)
    widths = (getattr(module, attribute, None) for attribute in ("out_features", "nf", "embedding_dim"))
    return next((width for width in widths if isinstance(width, int)), None)


class _Target(NamedTuple):
    """What an adapter puts at one module: a bottleneck behind it, or with `width=None` a copy of it."""

    width: int | None
    near: nn.Module


class HoulsbyModel(TaskTuner):
    """The tuner of Houlsby bottlenecks."""

    method = HOULSBY
    tuner_layer_cls = HoulsbyTunerLayer

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: HoulsbyPeftConfig, model_config: dict[str, Any]
    ) -> HoulsbyPeftConfig:
        blocks = list(iter_blocks(self.model, peft_config.sites))
        targets: dict[str, _Target] = {}
        self._excluded: set[str] = set()
        if names_blocks(peft_config.target_modules, blocks):
            blocks = self._find_blocks(peft_config)
            chosen, self._excluded = choose_blocks(peft_config, blocks)
            for block in chosen:
                for path in (block.sites.attention_output, block.sites.ffn_output):
                    targets[self._name(block, path)] = _Target(block.width, block.module)
        else:
            targets = self._find_modules(peft_config, blocks)
            chosen = [b for b in blocks if any(name.startswith(f"{b.name}.") for name in targets)]
        if peft_config.train_layernorm:
            for name in self._norms(peft_config, blocks, chosen):
                targets.setdefault(name, _Target(None, self.model))
        self._targets = targets
        return peft_config

    def _find_blocks(self, config: HoulsbyPeftConfig) -> list[Block]:
        try:
            return find_blocks(self.model, config.sites)
        except SiteError as error:
            raise SiteError(f"{error} Or name modules as for LoRA, target_modules=['<name>', ...].") from None

    def _name(self, block: Block, path: str) -> str:
        module = resolve(block.module, path)
        inside = next(name for name, m in block.module.named_modules() if m is module)
        return f"{block.name}.{inside}" if inside else block.name

    def _find_modules(self, config: HoulsbyPeftConfig, blocks: list[Block]) -> dict[str, _Target]:
        """The modules that the config names as it would for LoRA."""
        found, self._excluded = matching_modules(config, self.model)
        targets: dict[str, _Target] = {}
        for name, module in found.items():
            block = next((b for b in blocks if name.startswith(f"{b.name}.")), None)
            targets[name] = self._target(name, module, block)
        if not targets:
            example = f" such as {blocks[0].name!r}" if blocks else ""
            left_out = f" that exclude_modules={config.exclude_modules!r} leaves" if config.exclude_modules else ""
            raise ConfigError(
                f"target_modules={config.target_modules!r} names neither a block nor a module of "
                f"{type(self.model).__name__}{left_out}: use names of blocks{example}, of the list that holds them, "
                "or of modules as for LoRA."
            )
        return targets

    @staticmethod
    def _target(name: str, module: nn.Module, block: Block | None) -> _Target:
        width = _width(module)
        if width is None and block is not None:
            sites = block.sites
            wide = (sites.attention, sites.attention_output, sites.ffn_output, sites.output)
            width = block.width if any(resolve(block.module, path) is module for path in wide) else None
        if width is None or isinstance(module, (nn.Sequential, nn.ModuleList)):
            raise SiteError(
                f"target_modules: the output width of {name!r}, a {type(module).__name__}, is not known. Use blocks, "
                "their attention or feed-forward part, or linear modules."
            )
        return _Target(width, module if block is None else block.module)

    def _norms(self, config: HoulsbyPeftConfig, blocks: list[Block], chosen: list[Block]) -> Iterator[str]:
        """The norms of the chosen blocks, and all others of the base model if every block is chosen."""
        base = getattr(self.model, "base_model", self.model)
        prefix = next((f"{n}." if n else "" for n, m in self.model.named_modules() if m is base), "")
        left = [f"{b.name}." for b in blocks if b not in chosen]
        inner = [
            f"{n}." for n, m in self.model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]
        saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in config.modules_to_save or ()]
        for name, module in base.named_modules():
            name = prefix + name
            if not is_norm(module) and not isinstance(module, HoulsbyNorm):
                continue
            if any(name.startswith(p) for p in (*left, *inner)) or any(pattern.match(name) for pattern in saved):
                continue
            if left and not any(name.startswith(f"{b.name}.") for b in blocks):
                continue
            yield name

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return EXCLUDED if key in self._excluded else key in self._targets

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
        width, near = self._targets[current_key]
        layer: nn.Module | None
        if width is not None:
            layer = target._modules.get(HOULSBY.name)
            if layer is None:
                layer = HoulsbyLayer(self.model, target, width, near)
                target.add_module(HOULSBY.name, layer)
                layer.train(target.training)
        else:
            layer = target if isinstance(target, HoulsbyNorm) else None
            if layer is None:
                layer = HoulsbyNorm(self.model, target, parent, target_name)
                setattr(parent, target_name, layer)
                layer.train(target.training)
        assert isinstance(layer, (HoulsbyLayer, HoulsbyNorm))
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)


register(HOULSBY, HoulsbyPeftConfig, HoulsbyModel)
