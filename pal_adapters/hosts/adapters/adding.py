"""Adding an adapter to a model of `adapters`: whether it fits, what depends on the model, a layer for each block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from adapters.configuration import ADAPTER_CONFIG_MAP, AdapterConfig, BnConfig, ConfigUnion, LoRAConfig
from adapters.methods.bottleneck import BottleneckLayer
from adapters.model_mixin import ModelAdaptersMixin, ModelUsingSubmodelsAdaptersMixin
from adapters.utils import get_adapter_config_hash
from torch import nn

from pal_adapters.blocks.sites import Block, find_blocks, resolve
from pal_adapters.errors import ConfigError, PalAdaptersError, SiteError, UnsupportedError
from pal_adapters.hosts.method import filled, parameters_of

from .composition import architectures
from .config import TaskAdapterConfig, is_ours, task_configs
from .layer import TaskLayer, task_parameters

_TABLE = r"shared_parameters\."


class Plan(NamedTuple):
    """What adding a config to a model comes to: `configs` are our members of it, filled in, by identity."""

    layers: list[tuple[int, nn.Module]]
    blocks: list[Block]
    configs: dict[int, TaskAdapterConfig]
    shares: bool


def supports_adapter(original: Any) -> Any:
    """`ModelAdaptersMixin.supports_adapter` that knows whether one of our configs, or its string, can be added."""

    def wrapper(self: ModelAdaptersMixin, type_or_config: Any) -> bool:
        config = ADAPTER_CONFIG_MAP.get(type_or_config) if isinstance(type_or_config, str) else type_or_config
        if isinstance(config, AdapterConfig):
            try:
                _plan(self, config)
            except PalAdaptersError:
                return False
        return original(self, type_or_config)

    return wrapper


def add_adapter(original: Any) -> Any:
    """`ModelAdaptersMixin.add_adapter` that says why one of our configs does not fit, which the host would not."""

    def wrapper(self: ModelAdaptersMixin, adapter_name: str, config: Any = None, *args: Any, **kwargs: Any) -> None:
        config = AdapterConfig.load(config)
        _plan(self, config)
        original(self, adapter_name, config, *args, **kwargs)

    return wrapper


def add_adapter_weights(original: Any) -> Any:
    """`ModelAdaptersMixin._add_adapter_weights` that gives each block its layer first."""

    def wrapper(self: ModelAdaptersMixin, adapter_name: str) -> None:
        configs = _prepare(self, adapter_name)
        original(self, adapter_name)
        for config in configs:
            if not any(
                config.method.name in layer.task_layer.methods(adapter_name) for _, layer in self.iter_layers()
            ):
                raise ConfigError(
                    f"leave_out={list(config.leave_out)} is not allowed: it leaves no block for {config.architecture}."
                )

    return wrapper


def _prepare(model: ModelAdaptersMixin, adapter_name: str) -> list[TaskAdapterConfig]:
    """Fill in what depends on the model, check, and give each block its layer. Raises before anything changes."""
    whole = model.adapters_config.get(adapter_name)
    if not is_ours(architectures(whole)):
        return []
    whole = AdapterConfig.load(whole)
    layers, blocks, prepared, shares = _plan(model, whole)
    base = model.base_model
    _check_other_sites(layers, blocks, prepared.values())
    if shares and isinstance(base, ModelUsingSubmodelsAdaptersMixin):
        # Encoder and decoder hold the same table of shared tensors: `save_pretrained` needs to know.
        base._tied_weights_keys = sorted({*(base._tied_weights_keys or ()), _TABLE})
    _replace_config(model, adapter_name, whole, prepared)
    for (_, layer), block in zip(layers, blocks, strict=True):
        task_layer = getattr(layer, "task_layer", None)
        if not isinstance(task_layer, TaskLayer):
            layer.task_layer = TaskLayer(base, block).train(layer.training)
        elif task_layer.block.sites == block.sites:
            task_layer.link(base, block)
        else:  # without an adapter, see `_check_other_sites`
            task_layer.attachment.remove()
            layer.task_layer = TaskLayer(base, block).train(layer.training)
    return list(prepared.values())


def _plan(model: ModelAdaptersMixin, whole: AdapterConfig) -> Plan:
    """Raises if a config does not fit the model, and changes nothing."""
    configs = list(task_configs(whole))
    if not configs:
        return Plan([], [], {}, False)
    base = model.base_model
    layers = list(model.iter_layers())
    blocks = _find(base, [layer for _, layer in layers], configs)
    _check_leave_out(configs, sorted({i for i, _ in layers}))
    parameters = parameters_of(base, blocks, task_parameters(base))
    prepared = {id(c): filled(c, c.method.prepare(c, blocks, parameters)) for c in configs}
    return Plan(layers, blocks, prepared, _shares(whole, list(prepared.values()), blocks))


def _find(base: nn.Module, layers: list[nn.Module], configs: list[TaskAdapterConfig]) -> list[Block]:
    named = [c.sites for c in configs if c.sites is not None]
    if any(sites != named[0] for sites in named):
        raise ConfigError(f"sites={named[1]} is not allowed beside sites={named[0]} in one union: use the same.")
    found = {id(block.module): block for block in find_blocks(base, named[0] if named else None)}
    blocks = []
    for position, layer in enumerate(layers):
        if id(layer) not in found:
            raise SiteError(
                f"block {position} of {type(base).__name__} ({type(layer).__name__}) has no known structure: pass "
                "sites={...} in the config or call pal_adapters.register_block(...)."
            )
        blocks.append(_host_sites(found[id(layer)]))
    return blocks


def _check_other_sites(
    layers: list[tuple[int, nn.Module]], blocks: list[Block], configs: Iterable[TaskAdapterConfig]
) -> None:
    for (_, layer), block in zip(layers, blocks, strict=True):
        task_layer = getattr(layer, "task_layer", None)
        if isinstance(task_layer, TaskLayer) and task_layer.pal_adapters and task_layer.block.sites != block.sites:
            named = next((c.sites for c in configs if c.sites is not None), None)
            raise ConfigError(
                f"sites={named} is not allowed: {', '.join(task_layer.pal_adapters)} use other "
                f"sites of {type(layer).__name__}, {task_layer.block.sites.to_dict()}. All adapters need the same."
            )


def _host_sites(block: Block) -> Block:
    """The host's own blocks call a norm from their bottleneck layer, twice with some configs: attach around it."""
    module, sites = block.module, block.sites
    own = getattr(module, "output_adapters", None)
    if sites.residual_at == "input" and isinstance(own, BottleneckLayer) and not own.is_layer_hooked:
        sites = replace(sites, residual="output_adapters", residual_at="input")
    if isinstance(resolve(module, sites.output), nn.LayerNorm):
        sites = replace(sites, output="")
    return replace(block, sites=sites)


def _check_leave_out(configs: list[TaskAdapterConfig], indices: list[int]) -> None:
    for config in configs:
        if not set(config.leave_out) <= set(indices):
            raise ConfigError(
                f"leave_out={list(config.leave_out)} is not allowed: the blocks are {indices[0]} to {indices[-1]}."
            )


def _shares(whole: AdapterConfig, configs: list[TaskAdapterConfig], blocks: list[Block]) -> bool:
    """Whether blocks share tensors; refuses Compacter and VeRA beside them, whose own table would replace ours."""
    with torch.device("meta"):
        tied = [c for c in configs if c.method.build_shared(c, blocks[0]) is not None]
    for member in whole.configs if isinstance(whole, ConfigUnion) else ():
        if isinstance(member, BnConfig):
            other = "Compacter" if member.phm_layer and (member.shared_phm_rule or member.shared_W_phm) else ""
        else:
            vera = isinstance(member, LoRAConfig) and not (member.vera_d is None and member.vera_b is None)
            other = "VeRA" if vera else ""
        if tied and other:
            raise UnsupportedError(
                f"{other} and {tied[0].architecture} with tied projections cannot be in one ConfigUnion: adapters "
                "keeps shared tensors of both under one name. Add two adapters and use Stack."
            )
    return bool(tied)


def _replace_config(
    model: ModelAdaptersMixin, adapter_name: str, config: AdapterConfig, prepared: dict[int, TaskAdapterConfig]
) -> None:
    if isinstance(config, TaskAdapterConfig):
        config = prepared[id(config)]
    else:
        config = ConfigUnion(*[prepared.get(id(c), c) for c in config.configs])
    known = model.adapters_config
    before, name = known.adapters[adapter_name], get_adapter_config_hash(config)
    known.config_map[name] = config
    known.adapters[adapter_name] = name
    if before not in known.adapters.values():
        known.config_map.pop(before, None)
