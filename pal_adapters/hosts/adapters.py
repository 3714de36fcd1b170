"""Registration with `adapters`, and the only place that touches its internals.

Every touch, for adapters 1.3:

| upstream symbol                                  | what and why                                                   |
|--------------------------------------------------|----------------------------------------------------------------|
| `AdapterConfig._get_config_class`                | wrapped: its table of architectures is closed                  |
| `AdapterMethod.get_from_config`                  | wrapped: a model's interface would have to list our methods;   |
|                                                  | whether they fit is found from the model instead               |
| `ADAPTER_CONFIG_MAP`                             | gets our strings                                               |
| `ModelAdaptersMixin._add_adapter_weights`        | wrapped: gives blocks their `TaskLayer` before the first use   |
| `BottleneckLayer.bottleneck_layer_forward`       | wrapped: compositions that mix our adapters with bottlenecks   |
| `AdapterLoader.filter_func`, `.rename_func`      | wrapped: the host overlooks `shared_parameters` of a model     |
|                                                  | without a head, and a jointly trained base belongs to the file |

`tests/hosts/test_adapters_touches.py` fails when one of them moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import adapters
from adapters.configuration import ADAPTER_CONFIG_MAP, AdapterConfig, ConfigUnion
from adapters.interface import AdapterMethod
from adapters.loading import AdapterLoader
from adapters.methods.bottleneck import BottleneckLayer
from adapters.model_mixin import ModelAdaptersMixin
from adapters.utils import get_adapter_config_hash
from packaging.version import Version
from torch import nn

from ..errors import ConfigError, MissingHostError, SiteError
from .adapters_config import TaskAdapterConfig, task_configs
from .adapters_layer import Mixture, TaskLayer, base_parameters, task_parameters
from .methods import parameters_of
from .sites import Block, find_blocks, resolve

_CONFIGS: dict[str, type[TaskAdapterConfig]] = {}
_TOUCHED = "_pal_adapters_original"


def register(config_class: type[TaskAdapterConfig], presets: dict[str, TaskAdapterConfig]) -> None:
    """Make a method known to the host: its architecture and the strings of its ready configs. Idempotent.

    Raises:
        ConfigError: if the host or another plugin owns one of the strings already.
    """
    _install()
    for name, preset in presets.items():
        owner = ADAPTER_CONFIG_MAP.get(name)
        if owner is not None and type(owner) is not type(preset):
            raise ConfigError(f"the adapters host has a config named {name!r} already ({type(owner).__name__}).")
        ADAPTER_CONFIG_MAP[name] = preset
    _CONFIGS[config_class.method.name] = config_class


def _wrap(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]], *, static: bool = False) -> None:
    original = getattr(owner, name)
    if hasattr(original, _TOUCHED):
        return
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _TOUCHED, original)
    setattr(owner, name, staticmethod(wrapper) if static else wrapper)


def _install() -> None:
    version = Version(adapters.__version__)
    if not Version("1.3") <= version < Version("1.4"):
        raise MissingHostError(f"adapters {version} is not supported: install 'adapters>=1.3,<1.4'.")
    _wrap(AdapterConfig, "_get_config_class", _config_class, static=True)
    _wrap(AdapterMethod, "get_from_config", _methods_of_config, static=True)
    _wrap(ModelAdaptersMixin, "_add_adapter_weights", _add_adapter_weights)
    _wrap(BottleneckLayer, "bottleneck_layer_forward", _bottleneck_layer_forward)
    _wrap(AdapterLoader, "filter_func", _filter_func)
    _wrap(AdapterLoader, "rename_func", _rename_func)


def _config_class(original: Any) -> Any:
    def _get_config_class(config_dict: dict[str, Any]) -> type:
        ours = _CONFIGS.get(config_dict.get("architecture") or "")
        return ours if ours is not None else original(config_dict)

    return _get_config_class


def _methods_of_config(original: Any) -> Any:
    def get_from_config(config: AdapterConfig) -> list[str]:
        return [] if isinstance(config, TaskAdapterConfig) else original(config)

    return get_from_config


def _add_adapter_weights(original: Any) -> Any:
    def wrapper(self: ModelAdaptersMixin, adapter_name: str) -> None:
        config = self.adapters_config.get(adapter_name)
        if config is not None and list(task_configs(config)):
            _prepare(self, adapter_name)
        original(self, adapter_name)

    return wrapper


def _prepare(model: ModelAdaptersMixin, adapter_name: str) -> None:
    """Fill in what depends on the model, check, and give each block its layer. Raises before anything changes."""
    base = model.base_model
    whole = AdapterConfig.load(model.adapters_config.get(adapter_name))
    configs = list(task_configs(whole))
    named = next((c.sites for c in configs if c.sites is not None), None)
    found = {id(block.module): block for block in find_blocks(base, named)}
    layers = list(model.iter_layers())
    missing = [i for i, layer in layers if id(layer) not in found]
    if missing:
        raise SiteError(
            f"block {missing[0]} of {type(base).__name__} ({type(layers[missing[0]][1]).__name__}) has no known "
            "structure: pass sites={...} in the config or call pal_adapters.register_block(...)."
        )
    for config in configs:
        outside = [i for i in config.leave_out if i >= len(layers)]
        if outside:
            raise ConfigError(
                f"leave_out={list(config.leave_out)} is not allowed: the model has blocks 0 to {len(layers) - 1}."
            )
    blocks = [found[id(layer)] for _, layer in layers]
    parameters = parameters_of(base, blocks, task_parameters(base))
    prepared = {id(c): c.method.prepare(c, blocks, parameters) for c in configs}
    _replace_config(model, adapter_name, whole, prepared)
    for (_, layer), block in zip(layers, blocks):
        if not isinstance(getattr(layer, "task_layer", None), TaskLayer):
            layer.task_layer = TaskLayer(base, _host_sites(block)).train(layer.training)


def _host_sites(block: Block) -> Block:
    """The host's own blocks call a norm from their bottleneck layer, twice with some configs: attach around it."""
    module, sites = block.module, block.sites
    own = getattr(module, "output_adapters", None)
    if isinstance(own, BottleneckLayer) and not own.is_layer_hooked:
        sites = replace(sites, residual="output_adapters", residual_at="input")
    if isinstance(resolve(module, sites.output), nn.LayerNorm):
        sites = replace(sites, output="")
    return replace(block, sites=sites)


def _replace_config(
    model: ModelAdaptersMixin, adapter_name: str, config: AdapterConfig, prepared: dict[int, TaskAdapterConfig]
) -> None:
    if isinstance(config, TaskAdapterConfig):
        config = prepared[id(config)]
    else:
        config = ConfigUnion(*[prepared.get(id(c), c) for c in config.configs])
    name = get_adapter_config_hash(config)
    model.adapters_config.config_map[name] = config
    model.adapters_config.adapters[adapter_name] = name


def _bottleneck_layer_forward(original: Any) -> Any:
    def wrapper(self: BottleneckLayer, hidden_states: Any, residual_input: Any, layer_norm: Any) -> Any:
        (task_layer,) = getattr(self, "pal_adapters_task_layer", (None,))
        if task_layer is not None:
            setup = task_layer.get_active_setup()
            if setup is not None and task_layer.needs_mixture(setup):
                hidden_states, residual_input = _match_batches(hidden_states, residual_input)
                return Mixture(self, task_layer).forward(setup, hidden_states, residual_input, layer_norm)
        return original(self, hidden_states, residual_input, layer_norm)

    return wrapper


def _match_batches(hidden_states: Any, residual_input: Any) -> tuple[Any, Any]:
    if residual_input is None or hidden_states.shape[0] == residual_input.shape[0]:
        return hidden_states, residual_input
    batch = max(hidden_states.shape[0], residual_input.shape[0])
    grown = [t.repeat(batch // t.shape[0], 1, 1) for t in (hidden_states, residual_input)]
    return grown[0], grown[1]


def _base_keys(model: ModelAdaptersMixin) -> Iterable[str]:
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    return {prefix + name for name in base_parameters(base)}


def _filter_func(original: Any) -> Any:
    def filter_func(self: AdapterLoader, adapter_name: str) -> Callable[[str], bool]:
        keep = original(self, adapter_name)
        start = f"shared_parameters.{adapter_name}."
        configs = task_configs(self.model.adapters_config.get(adapter_name))
        base = set(_base_keys(self.model)) if any(c.train_base for c in configs) else set()
        return lambda key: keep(key) or key.startswith(start) or key in base

    return filter_func


def _rename_func(original: Any) -> Any:
    def rename_func(self: AdapterLoader, old_name: str, new_name: str) -> Callable[[str], str]:
        rename = original(self, old_name, new_name)
        start = f"shared_parameters.{old_name}."

        def renamed(key: str) -> str:
            if key.startswith(start):
                return f"shared_parameters.{new_name}.{key.removeprefix(start)}"
            return rename(key)

        return renamed

    return rename_func
