"""Adding an adapter to a model of `adapters`: checks that it fits, fills in sizes, gives each block its layer."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from adapters.configuration import ADAPTER_CONFIG_MAP, AdapterConfig, BnConfig, ConfigUnion, LoRAConfig
from adapters.methods.bottleneck import BottleneckLayer
from adapters.model_mixin import ModelAdaptersMixin, ModelUsingSubmodelsAdaptersMixin
from adapters.utils import get_adapter_config_hash
from torch import nn

from pal_adapters.blocks.sites import Block, find_blocks, resolve
from pal_adapters.blocks.survey import partial_reach
from pal_adapters.errors import ConfigError, PalAdaptersError, SiteError, UnknownAdapterError, UnsupportedError
from pal_adapters.hooks.in_place import require_untied
from pal_adapters.hosts.in_place import check_beside
from pal_adapters.hosts.method import filled, parameters_of
from pal_adapters.hosts.names import require_adapter_name

from .base_weights import task_parameters
from .composition import architectures
from .config import TaskAdapterConfig, any_registered, given_configs
from .in_place import parts_of
from .layer import TaskLayer

_TABLE = r"shared_parameters\."


class Plan(NamedTuple):
    """What adding a config to a model would do.

    Attributes:
        layers: the host's layers with their indices.
        blocks: the block of each layer.
        configs: the configs of this package, complete.
        kept: the config that the model keeps: as given, with the chosen values beside it.
        shares: whether blocks share tensors.
    """

    layers: list[tuple[int, nn.Module]]
    blocks: list[Block]
    configs: list[TaskAdapterConfig]
    kept: AdapterConfig
    shares: bool


def supports_adapter(original: Any) -> Any:
    """`ModelAdaptersMixin.supports_adapter`, which checks whether a config of this package fits the model."""

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
    """`ModelAdaptersMixin.add_adapter`, which says why a config of this package does not fit."""

    def wrapper(self: ModelAdaptersMixin, adapter_name: str, config: Any = None, *args: Any, **kwargs: Any) -> None:
        config = load_config(config)
        if any(True for _ in given_configs(config)):
            require_adapter_name("adapter_name", adapter_name)
        plan = _plan(self, config)
        if plan.configs and (reach := partial_reach(self, plan.blocks)):
            warnings.warn(
                f"{plan.configs[0].method.name}: {reach} The host reaches the blocks that its interface lists: pass "
                "adapters.init(model, interface=...) to choose others; see pal_adapters.describe_sites.",
                stacklevel=3,
            )
        original(self, adapter_name, config, *args, **kwargs)

    return wrapper


def add_adapter_to_whole(original: Any) -> Any:
    """`add_adapter` of a model with or without a head, which looks at ties between the two."""

    def wrapper(self: ModelAdaptersMixin, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        original(self, adapter_name, *args, **kwargs)
        require_untied(self, parts_of(self, adapter_name))

    return wrapper


def average_adapter(original: Any) -> Any:
    """`ModelAdaptersMixin.average_adapter`, which rejects unknown adapters and weights that are not numbers."""

    def wrapper(
        self: ModelAdaptersMixin,
        adapter_name: str,
        adapter_list: list[str],
        weights: list[float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        unknown = [name for name in adapter_list if name not in self.adapters_config]
        if unknown:
            raise UnknownAdapterError(
                f"the model has no adapter {unknown[0]!r}: use one of {', '.join(self.adapters_config)}."
            )
        if weights is not None and not all(math.isfinite(weight) for weight in weights):
            raise ConfigError(f"weights={weights!r} is not allowed: use finite numbers.")
        original(self, adapter_name, adapter_list, weights, *args, **kwargs)

    return wrapper


def load_config(config: Any) -> AdapterConfig | None:
    """The config that the host's `config` argument stands for.

    Raises:
        ConfigError: for a string that names a method of this package but cannot be parsed; says what to write.
    """
    try:
        return AdapterConfig.load(config)
    except (TypeError, ValueError) as error:
        names = [] if not isinstance(config, str) else [part.partition("[")[0].strip() for part in config.split("|")]
        ours = [preset for name in names if isinstance(preset := ADAPTER_CONFIG_MAP.get(name), TaskAdapterConfig)]
        if isinstance(error, PalAdaptersError) or not ours:
            raise
        raise ConfigError(f"config={config!r} is not allowed: {_string_fault(config, error, ours)}") from error


def _string_fault(config: str, error: Exception, presets: list[TaskAdapterConfig]) -> str:
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown is not None:
        options = next(names for p in presets if unknown[2] not in (names := [f.name for f in fields(p)]))
        return f"{unknown[2]} is not an argument of {unknown[1]}: use {', '.join(options)}."
    quoted = re.sub(r"=\s*(?!(?:True|False|None)\b)([A-Za-z_]\w*)", r"='\1'", config)
    if quoted != config:
        return f"strings in brackets need quotes, write {quoted!r}."
    return f"write options as Python values in brackets, such as \"{presets[0].method.name}[init_weights='bert']\"."


def add_adapter_weights(original: Any) -> Any:
    """`ModelAdaptersMixin._add_adapter_weights`, which gives each block its layer first."""

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
    """Check the config, fill in what depends on the model, and give each block its layer."""
    whole = model.adapters_config.get(adapter_name)
    if not any_registered(architectures(whole)):
        return []
    plan = _plan(model, AdapterConfig.load(whole))
    base = model.base_model
    _check_other_sites(plan)
    _check_beside(model, adapter_name, plan.configs)
    if plan.shares and isinstance(base, ModelUsingSubmodelsAdaptersMixin):
        # Encoder and decoder hold the same table of shared tensors, which `save_pretrained` has to know.
        base._tied_weights_keys = sorted({*(base._tied_weights_keys or ()), _TABLE})
    _replace_config(model, adapter_name, plan.kept)
    for (_, layer), block in zip(plan.layers, plan.blocks, strict=True):
        task_layer = getattr(layer, "task_layer", None)
        if not isinstance(task_layer, TaskLayer):
            layer.task_layer = TaskLayer(base, block).train(layer.training)
        elif task_layer.block.sites == block.sites:
            task_layer.link(base, block)
        else:  # an empty one, see `_check_other_sites`
            task_layer.attachment.remove()
            layer.task_layer = TaskLayer(base, block).train(layer.training)
    return plan.configs


def _plan(model: ModelAdaptersMixin, whole: AdapterConfig | None) -> Plan:
    """Check that a config fits the model; changes nothing."""
    given = list(given_configs(whole))
    if not given or whole is None:
        return Plan([], [], [], whole, False)
    base = model.base_model
    layers = list(model.iter_layers())
    blocks = _find(base, [layer for _, layer in layers], given)
    _check_leave_out(given, sorted({i for i, _ in layers}))
    for config in given:
        config.method.reachable(blocks)
    parameters = parameters_of(base, blocks, set(map(id, task_parameters(base))))
    configs = [filled(c, c.method.prepare(c, blocks, parameters)) for c in (c.resolved() for c in given)]
    shares = _shares(whole, configs, blocks)
    kept = {id(c): _with_chosen(c, complete) for c, complete in zip(given, configs, strict=True)}
    if isinstance(whole, ConfigUnion):
        return Plan(layers, blocks, configs, ConfigUnion(*[kept.get(id(c), c) for c in whole.configs]), shares)
    return Plan(layers, blocks, configs, kept[id(whole)], shares)


def _with_chosen(given: TaskAdapterConfig, complete: TaskAdapterConfig) -> TaskAdapterConfig:
    chosen = {
        name: getattr(complete, name)
        for name in (f.name for f in fields(given))
        if name != "chosen" and getattr(given, name) is None and getattr(complete, name) is not None
    }
    return given.replace(chosen=chosen or None)


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


def _check_other_sites(plan: Plan) -> None:
    for (_, layer), block in zip(plan.layers, plan.blocks, strict=True):
        task_layer = getattr(layer, "task_layer", None)
        if isinstance(task_layer, TaskLayer) and task_layer.pal_adapters and task_layer.block.sites != block.sites:
            named = next((c.sites for c in plan.configs if c.sites is not None), None)
            raise ConfigError(
                f"sites={named} is not allowed: {', '.join(task_layer.pal_adapters)} already use other sites of "
                f"{type(layer).__name__}, {task_layer.block.sites.to_dict()}. All adapters of a model need the same."
            )


def _check_beside(model: ModelAdaptersMixin, adapter_name: str, configs: list[TaskAdapterConfig]) -> None:
    if not any(config.method.network or config.train_base for config in configs):
        return
    known = model.adapters_config
    others = [  # without a call for each adapter: there may be a thousand
        (name, member)
        for name, key in known.adapters.items()
        if name != adapter_name
        for whole in (known.config_map.get(key),)
        for member in (whole.configs if type(whole) is ConfigUnion else (whole,))
    ]
    others += [(adapter_name, config) for config in configs]
    for config in configs:
        check_beside(adapter_name, config, [(name, other) for name, other in others if other is not config])


def _host_sites(block: Block) -> Block:
    """The host's own blocks call a norm inside their bottleneck layer, twice with some configs: attach around it."""
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
    """Whether blocks share tensors; rejects Compacter and VeRA beside them, which would replace the shared tensors."""
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
                f"{other} and {tied[0].architecture} with tied projections cannot share a ConfigUnion: adapters "
                "keeps the shared tensors of both under one name. Add two adapters and use Stack."
            )
    return bool(tied)


def _replace_config(model: ModelAdaptersMixin, adapter_name: str, kept: AdapterConfig) -> None:
    known = model.adapters_config
    before, name = known.adapters[adapter_name], get_adapter_config_hash(kept)
    known.config_map[name] = kept
    known.adapters[adapter_name] = name
    if before not in known.adapters.values():
        known.config_map.pop(before, None)
