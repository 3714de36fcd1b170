"""Houlsby bottlenecks and the variants of the PALs paper in PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from pal_adapters.blocks import signatures
from pal_adapters.blocks.sites import Block, find_blocks, iter_blocks, resolve
from pal_adapters.errors import ConfigError, SiteError, UnsupportedError
from pal_adapters.hosts.peft.config import TaskPeftConfig, choose_blocks, names_blocks
from pal_adapters.hosts.peft.registration import register
from pal_adapters.hosts.peft.tuner import EXCLUDED, TaskTuner, matching_modules

from .config import HOULSBY, HoulsbyOptions, HoulsbyPALOptions, ParallelHoulsbyOptions
from .layer import HoulsbyBottleneck
from .peft_layers import HoulsbyLayer, HoulsbyNorm, HoulsbyTunerLayer, is_scaled_norm, output_width


@dataclass
class ParallelHoulsbyPeftConfig(ParallelHoulsbyOptions, TaskPeftConfig):
    """The Houlsby variant of the PALs paper: `get_peft_model(model, ParallelHoulsbyPeftConfig(task_type="SEQ_CLS"))`.

    Its options are those of `pal_adapters.methods.houlsby.config.ParallelHoulsbyOptions`, and those of every config,
    `pal_adapters.hosts.peft.config.TaskPeftConfig`.

    Args:
        init_weights: True (a new adapter changes nothing) or False (`N(0, 0.02^2)`, as the authors do).
    """


@dataclass
class HoulsbyPALPeftConfig(HoulsbyPALOptions, TaskPeftConfig):
    """A bottleneck after attention and a PAL parallel to the feed-forward part: `get_peft_model(model,
    HoulsbyPALPeftConfig(task_type="SEQ_CLS"))`.

    Its options are those of `pal_adapters.methods.houlsby.config.HoulsbyPALOptions`, and those of every config,
    `pal_adapters.hosts.peft.config.TaskPeftConfig`.

    Args:
        init_weights: True (a new adapter changes nothing) or False (`N(0, 0.02^2)`, as the authors do).
    """


@dataclass
class HoulsbyPeftConfig(HoulsbyOptions, TaskPeftConfig):
    """The bottlenecks of Houlsby et al.: `get_peft_model(model, HoulsbyPeftConfig(task_type="SEQ_CLS"))`.

    Its options are those of `pal_adapters.methods.houlsby.config.HoulsbyOptions`, and those of every config,
    `pal_adapters.hosts.peft.config.TaskPeftConfig`.

    Args:
        target_modules: blocks as in the other configs, or modules after which a bottleneck is added, as for LoRA
            (`["attention.output.dense", "output.dense"]`); None finds both branches of every block.
        init_weights: True (`W_2 = 0`, so that a new adapter changes nothing) or False (a truncated normal for both
            matrices, as in the paper).
    """


class _Target(NamedTuple):
    """What an adapter adds at one module: a bottleneck after it, or with `width=None` a copy of it.

    `layout` is that of the block that the module is a part of, see `BlockSites.layout`.
    """

    width: int | None
    near: nn.Module
    layout: str = "tokens"


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
                    targets[self._name(block, path)] = _Target(block.width, block.module, block.sites.layout)
        else:
            targets = self._find_modules(peft_config, blocks)
            chosen = [b for b in blocks if any(name.startswith(f"{b.name}.") for name in targets)]
        if peft_config.train_layernorm:
            for name in self._norms(peft_config, blocks, chosen):
                norm = self.model.get_submodule(name)
                if "scaling_factor" in signatures.positions_of(norm):
                    raise UnsupportedError(
                        f"{name} is an {type(norm).__name__}, which returns a scaling factor too and cannot be "
                        "trained: pass train_layernorm=False."
                    )
                layouts = (block.sites.layout for block in blocks if name.startswith(f"{block.name}."))
                targets.setdefault(name, _Target(None, self.model, next(layouts, "tokens")))
        self._targets = targets
        return peft_config

    def _find_blocks(self, config: HoulsbyPeftConfig) -> list[Block]:
        try:
            return find_blocks(self.model, config.sites)
        except SiteError as error:
            raise SiteError(f"{error} Or name modules as for LoRA: target_modules=['<name>', ...].") from None

    def _name(self, block: Block, path: str) -> str:
        module = resolve(block.module, path)
        inside = next(name for name, m in block.module.named_modules() if m is module)
        return f"{block.name}.{inside}" if inside else block.name

    def _find_modules(self, config: HoulsbyPeftConfig, blocks: list[Block]) -> dict[str, _Target]:
        """The modules that the config names, as for LoRA."""
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
                "or of modules, as for LoRA."
            )
        return targets

    @staticmethod
    def _target(name: str, module: nn.Module, block: Block | None) -> _Target:
        width = output_width(module)
        if width is None and block is not None:
            sites = block.sites
            wide = (sites.attention, sites.attention_output, sites.ffn_output, sites.output)
            width = block.width if any(resolve(block.module, path) is module for path in wide) else None
        if width is None or isinstance(module, (nn.Sequential, nn.ModuleList)):
            raise SiteError(
                f"target_modules: the output width of {name!r}, a {type(module).__name__}, is not known. Use blocks, "
                "their attention or feed-forward part, or linear modules."
            )
        return _Target(width, module) if block is None else _Target(width, block.module, block.sites.layout)

    def _norms(self, config: HoulsbyPeftConfig, blocks: list[Block], chosen: list[Block]) -> Iterator[str]:
        """The norms of the selected blocks, and all other norms of the base model if every block is selected."""
        base = getattr(self.model, "base_model", self.model)
        prefix = next((f"{n}." if n else "" for n, m in self.model.named_modules() if m is base), "")
        left = [f"{b.name}." for b in blocks if b not in chosen]
        inner = [
            f"{n}." for n, m in self.model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]
        saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in config.modules_to_save or ()]
        for name, module in base.named_modules():
            name = prefix + name
            if not is_scaled_norm(module) and not isinstance(module, HoulsbyNorm):
                continue
            if any(name.startswith(p) for p in (*left, *inner)) or any(pattern.match(name) for pattern in saved):
                continue
            if "indexer" in name.split("."):  # it chooses tokens, and its norms get no gradient
                continue
            if left and not any(name.startswith(f"{b.name}.") for b in blocks):
                continue
            yield name

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return EXCLUDED if key in self._excluded else key in self._targets

    def _put(self, config: Any, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, path: str) -> None:
        width, near, layout = self._targets[path]
        layer: nn.Module | None
        if width is not None:
            layer = target._modules.get(HOULSBY.name)
            if layer is None:
                layer = HoulsbyLayer(self.model, target, width, near, layout)
                target.add_module(HOULSBY.name, layer)
                layer.train(target.training)
            assert isinstance(layer, HoulsbyLayer)
            unit = HoulsbyBottleneck(width, config.hidden_size, activation=config.activation, init_std=config.init_std)
            unit.reset_parameters(identity=config.init_weights)
            layer.add_unit(adapter_name, unit, inference_mode=config.inference_mode)
        else:
            layer = target
            if not isinstance(layer, HoulsbyNorm):
                layer = HoulsbyNorm(self.model, target, parent, name, layout)
                setattr(parent, name, layer)
                layer.train(target.training)
            layer.add_copy(adapter_name, inference_mode=config.inference_mode)
        self._freeze_inactive(layer, adapter_name)


register(ParallelHoulsbyPeftConfig)
register(HoulsbyPALPeftConfig)
register(HoulsbyPeftConfig, HoulsbyModel)
