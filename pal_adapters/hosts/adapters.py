"""Registration with `adapters`, and the only place that touches its internals.

Every symbol of adapters 1.3 that is replaced:

| upstream symbol                                  | what and why                                                   |
|--------------------------------------------------|----------------------------------------------------------------|
| `AdapterConfig._get_config_class`                | wrapped: its table of architectures is closed                  |
| `AdapterMethod.get_from_config`                  | wrapped: a model's interface would have to list our methods;   |
|                                                  | whether they fit is found from the model instead               |
| `ADAPTER_CONFIG_MAP`                             | gets our strings                                               |
| `ADAPTERFUSION_CONFIG_MAP`                       | gets our strings                                               |
| `ModelAdaptersMixin._add_adapter_weights`        | wrapped: gives blocks their `TaskLayer` before the first use   |
| `ModelAdaptersMixin.add_adapter_fusion`          | wrapped: reads our configs, which come from a file as the      |
|                                                  | host's class; refuses sets that cannot be fused, before they   |
|                                                  | count; links coefficients that blocks share                    |
| `ModelAdaptersMixin.init_adapters`               | wrapped: links them where a model comes with its fusions       |
| `ModelAdaptersMixin._load_adapter_setup_weights` | wrapped: a setup that cannot be loaded leaves the model as it  |
|                                                  | was                                                            |
| `ModelAdaptersMixin.merge_adapter`               | wrapped: the host passes over what it cannot merge             |
| `ModelWithHeadsAdaptersMixin.freeze_embeddings`  | wrapped: an embedding tied to the head belongs to a base that  |
|                                                  | is trained                                                     |
| `.train_adapter_fusion`                          | wrapped: a head model made from a file is not told of the      |
|                                                  | fusions that its base has, and it is the one that has a loss   |
| `Fuse._get_save_kwargs`                          | wrapped: a saved setup lost a fusion's own name                |
| `BottleneckLayer.bottleneck_layer_forward`       | wrapped: compositions that mix our adapters with bottlenecks   |
| `BottleneckLayer.add_fusion_layer`               | wrapped: the layer of a fusion is the host's own class         |
| `BottleneckLayer.compose_fuse`                   | wrapped: our fusions need no query, and one wide bottleneck    |
| `LoRALinear.pad_and_concat`, `.compose_average`, | wrapped: rows of adapters without LoRA; see `adapters_lora`    |
| `.compose_multi_task`                            |                                                                |
| `AdapterLoader.filter_func`, `.rename_func`      | wrapped: the host overlooks `shared_parameters` of a model     |
|                                                  | without a head, and a jointly trained base belongs to the file |
| `AdapterLoader.load`                             | wrapped: an adapter that cannot be loaded stays half added     |
| `AdapterFusionLoader.filter_func`,               | wrapped: the host takes `a,b,c` for a part of `a,b`            |
| `.rename_func`                                   |                                                                |
| `AdapterFusionLoader.load`                       | wrapped: a file that cannot be loaded leaves the model as it   |
|                                                  | was                                                            |
| `AdapterTrainer._load_adapter_fusions`           | wrapped: a resumed run lost fusions with names of their own    |
| `AdapterTrainer._load_best_model`                | wrapped: the head of a fusion stayed that of the last step     |

What is called or subclassed: `ComposableAdapterLayerBase` (`adapters_composition`, `adapters_layer`), `AdapterSetup`,
`ForwardContext` and `BottleneckLayer` with its adapters and fusion layers (`adapters_mixture`, `adapters_fusion`,
`adapters_sources`),
`AdapterConfig` and `AdapterFusionConfig` (`adapters_config`, `adapters_fusion`).
`tests/hosts/adapters/test_touches.py` fails when one of them moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import AdapterTrainer
from adapters.composition import Fuse
from adapters.configuration import ADAPTER_CONFIG_MAP, AdapterConfig, BnConfig, ConfigUnion, LoRAConfig
from adapters.configuration.adapter_fusion_config import ADAPTERFUSION_CONFIG_MAP
from adapters.interface import AdapterMethod
from adapters.loading import AdapterFusionLoader, AdapterLoader
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.lora import LoRALinear
from adapters.model_mixin import ModelAdaptersMixin, ModelUsingSubmodelsAdaptersMixin, ModelWithHeadsAdaptersMixin
from adapters.utils import get_adapter_config_hash
from packaging.version import Version
from torch import nn

from ..errors import (
    ConfigError,
    MissingHostError,
    PalAdaptersError,
    SiteError,
    UnknownAdapterError,
    UnsupportedError,
)
from . import adapters_fusion, adapters_lora, adapters_penalty, adapters_setup, adapters_sources, adapters_trainer
from .adapters_composition import architectures
from .adapters_config import CONFIGS, TaskAdapterConfig, is_ours, task_configs
from .adapters_layer import (
    TaskLayer,
    base_parameters,
    task_parameters,
    trains_base,
    trains_originals,
    unfusable,
)
from .adapters_mixture import Mixture
from .methods import parameters_of
from .sites import Block, find_blocks, resolve

_TOUCHED = "_pal_adapters_original"
_TABLE = r"shared_parameters\."


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
    CONFIGS[config_class.method.name] = config_class


def register_fusion(
    config_class: type[adapters_fusion.CombinationConfig], presets: Mapping[str, adapters_fusion.CombinationConfig]
) -> None:
    """Make a fusion known to the host: its config class and the strings of its ready configs. Idempotent.

    Raises:
        ConfigError: if the host or another plugin owns one of the strings already.
    """
    _install()
    for name, preset in presets.items():
        owner = ADAPTERFUSION_CONFIG_MAP.get(name)
        if owner is not None and type(owner) is not config_class:
            raise ConfigError(f"the adapters host has a fusion named {name!r} already ({type(owner).__name__}).")
        ADAPTERFUSION_CONFIG_MAP[name] = preset
    adapters_fusion.FUSIONS[str(next(iter(presets.values())).architecture)] = config_class


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
    _wrap(ModelAdaptersMixin, "add_adapter_fusion", _add_adapter_fusion)
    _wrap(ModelAdaptersMixin, "init_adapters", _init_adapters)
    _wrap(ModelAdaptersMixin, "_load_adapter_setup_weights", adapters_setup.load_adapter_setup_weights)
    _wrap(ModelAdaptersMixin, "merge_adapter", _merge_adapter)
    _wrap(ModelWithHeadsAdaptersMixin, "freeze_embeddings", _freeze_embeddings)
    _wrap(ModelWithHeadsAdaptersMixin, "train_adapter_fusion", _train_adapter_fusion)
    _wrap(Fuse, "_get_save_kwargs", adapters_setup.fuse_kwargs)
    _wrap(BottleneckLayer, "bottleneck_layer_forward", _bottleneck_layer_forward)
    _wrap(BottleneckLayer, "add_fusion_layer", _add_fusion_layer)
    _wrap(BottleneckLayer, "compose_fuse", _compose_fuse)
    for name in ("pad_and_concat", "compose_average", "compose_multi_task"):
        _wrap(LoRALinear, name, getattr(adapters_lora, name))
    _wrap(AdapterLoader, "filter_func", _filter_func)
    _wrap(AdapterLoader, "rename_func", _rename_func)
    _wrap(AdapterLoader, "load", _adapter_load)
    _wrap(AdapterFusionLoader, "filter_func", _fusion_filter_func)
    _wrap(AdapterFusionLoader, "rename_func", _fusion_rename_func)
    _wrap(AdapterFusionLoader, "load", _fusion_load)
    _wrap(AdapterTrainer, "_load_adapter_fusions", adapters_trainer.load_adapter_fusions)
    _wrap(AdapterTrainer, "_load_best_model", adapters_trainer.load_best_model)


# Configs


def _config_class(original: Any) -> Any:
    def _get_config_class(config_dict: Mapping[str, Any]) -> type:
        ours = CONFIGS.get(config_dict.get("architecture") or "")
        return ours if ours is not None else original(config_dict)

    return _get_config_class


def _methods_of_config(original: Any) -> Any:
    def get_from_config(config: AdapterConfig) -> list[str]:
        return [] if isinstance(config, TaskAdapterConfig) else original(config)

    return get_from_config


# Adding an adapter


def _add_adapter_weights(original: Any) -> Any:
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
    configs = list(task_configs(whole))
    base = model.base_model
    layers = list(model.iter_layers())
    blocks = _find(base, [layer for _, layer in layers], configs)
    _check_leave_out(configs, sorted({i for i, _ in layers}))
    parameters = parameters_of(base, blocks, task_parameters(base))
    prepared = {id(c): c.method.prepare(c, blocks, parameters) for c in configs}
    if _shares(whole, list(prepared.values()), blocks) and isinstance(base, ModelUsingSubmodelsAdaptersMixin):
        # Encoder and decoder hold the same table of shared tensors: `save_pretrained` needs to know.
        base._tied_weights_keys = sorted({*(base._tied_weights_keys or ()), _TABLE})
    _replace_config(model, adapter_name, whole, prepared)
    for (_, layer), block in zip(layers, blocks, strict=True):
        task_layer = getattr(layer, "task_layer", None)
        if not isinstance(task_layer, TaskLayer):
            layer.task_layer = TaskLayer(base, block).train(layer.training)
        elif task_layer.block.sites == block.sites:
            task_layer.link(base, block)
        else:  # without an adapter, see `_find`
            task_layer.attachment.remove()
            layer.task_layer = TaskLayer(base, block).train(layer.training)
    return list(prepared.values())


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
        block = _host_sites(found[id(layer)])
        task_layer = getattr(layer, "task_layer", None)
        if isinstance(task_layer, TaskLayer) and task_layer.pal_adapters and task_layer.block.sites != block.sites:
            raise ConfigError(
                f"sites={named[0] if named else None} is not allowed: {', '.join(task_layer.pal_adapters)} use other "
                f"sites of {type(layer).__name__}, {task_layer.block.sites.to_dict()}. All adapters need the same."
            )
        blocks.append(block)
    return blocks


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


# Fusing, merging and training


def _add_adapter_fusion(original: Any) -> Any:
    def wrapper(
        self: ModelAdaptersMixin,
        adapter_names: Any,
        config: Any = None,
        name: str | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> Any:
        children = adapter_names.split(",") if isinstance(adapter_names, str) else adapter_names
        names = [child if isinstance(child, str) else child.last() for child in children]
        preset = ADAPTERFUSION_CONFIG_MAP.get(config) if isinstance(config, str) else config
        ours = adapters_fusion.combination_config(preset)
        if ours is not None:
            key = name or (adapter_names.name if isinstance(adapter_names, Fuse) else ",".join(names))
            adapters_sources.check_sources(self.adapters_config, names)
            if key in self.adapters_config.fusions and not overwrite_ok:
                raise ConfigError(
                    f"the model has a fusion with the name {key!r}: delete it, or pass overwrite_ok=True."
                )
            adapter_names, name, config = names, key, config if isinstance(config, str) else ours
        if any(is_ours(architectures(self.adapters_config.get(source))) for source in names):
            for reason in filter(None, (unfusable(names, layer.task_layer) for _, layer in self.iter_layers())):
                raise UnsupportedError(reason)
        elif ours is None:
            return original(self, adapter_names, config, name, overwrite_ok, set_active)
        before = set(self.adapters_config.fusions)
        try:
            result = original(self, adapter_names, config, name, overwrite_ok, set_active)
            if ours is not None:
                adapters_fusion.link(self)
                adapters_penalty.watch(self)
            return result
        except ValueError:
            for added in set(self.adapters_config.fusions) - before:  # the host leaves it half added
                self.delete_adapter_fusion(added)
                self.adapters_config.fusion_name_map.pop(added, None)
            raise

    return wrapper


def _init_adapters(original: Any) -> Any:
    def wrapper(self: ModelAdaptersMixin, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        adapters_fusion.link(self)
        adapters_penalty.watch(self)

    return wrapper


def _train_adapter_fusion(original: Any) -> Any:
    def wrapper(self: ModelWithHeadsAdaptersMixin, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        adapters_penalty.watch(self)

    return wrapper


def _merge_adapter(original: Any) -> Any:
    def wrapper(self: ModelAdaptersMixin, name: str) -> None:
        for config in task_configs(self.adapters_config.get(name)):
            raise UnsupportedError(f"{name!r} cannot be merged into the base weights: {config.method.unmergeable}")
        original(self, name)

    return wrapper


def _freeze_embeddings(original: Any) -> Any:
    def wrapper(self: ModelWithHeadsAdaptersMixin, freeze: bool = True) -> None:
        trained: list[nn.Parameter] = []
        if trains_base(self.adapters_config, self.adapters_config.active_setup):
            trained = [p for p in base_parameters(self.base_model).values() if p.requires_grad]
        original(self, freeze)
        for parameter in trained:
            parameter.requires_grad = True

    return wrapper


# The forward pass


def _bottleneck_layer_forward(original: Any) -> Any:
    def wrapper(self: BottleneckLayer, hidden_states: Any, residual_input: Any, layer_norm: Any) -> Any:
        task_layer: TaskLayer | None = getattr(self, "pal_adapters_task_layer", (None,))[0]
        if task_layer is None:
            return original(self, hidden_states, residual_input, layer_norm)
        if self.is_layer_hooked and isinstance(layer_norm, nn.Module):
            # The host borrows a norm of the block (of the last block, in fact): our hooks on it are not for this call.
            layer_norm = layer_norm.forward
        setup = task_layer.mixed_setup()
        if setup is None:
            return original(self, hidden_states, residual_input, layer_norm)
        mixture = Mixture(self, task_layer)
        if not mixture.acts(setup):
            return original(self, hidden_states, residual_input, layer_norm)
        hidden_states, residual_input = _match_batches(hidden_states, residual_input)
        return mixture.forward(setup, hidden_states, residual_input, layer_norm)

    return wrapper


def _add_fusion_layer(original: Any) -> Any:
    def wrapper(self: BottleneckLayer, adapter_names: Any) -> None:
        name = adapter_names if isinstance(adapter_names, str) else ",".join(adapter_names)
        config, names = self.adapters_config.get_fusion(name)
        ours = adapters_fusion.combination_config(config)
        if ours is None:
            original(self, adapter_names)
        else:
            adapters_fusion.add_layer(self, name, ours, names)

    return wrapper


def _compose_fuse(original: Any) -> Any:
    def wrapper(self: BottleneckLayer, adapter_setup: Fuse, state: Any, lvl: int = 0) -> Any:
        name = adapter_setup.name
        if name in self.adapter_fusion_layer and isinstance(
            self.adapter_fusion_layer[name], adapters_fusion.Combination
        ):
            return adapters_fusion.compose(self, adapter_setup, state, lvl)
        if name not in self.adapters_config.fusions:
            raise UnknownAdapterError(
                f"{adapter_setup} has no fusion on the model, which has "
                f"{', '.join(map(repr, self.adapters_config.fusions)) or 'none'}: add it with add_adapter_fusion, or "
                "give Fuse(...) the name= of one of these."
            )
        return original(self, adapter_setup, state, lvl=lvl)

    return wrapper


def _match_batches(hidden_states: Any, residual_input: Any) -> tuple[Any, Any]:
    if residual_input is None or hidden_states.shape[0] == residual_input.shape[0]:
        return hidden_states, residual_input
    batch = max(hidden_states.shape[0], residual_input.shape[0])
    grown = [t.repeat(batch // t.shape[0], 1, 1) for t in (hidden_states, residual_input)]
    return grown[0], grown[1]


# Files


def _prefix(model: ModelAdaptersMixin) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _filter_func(original: Any) -> Any:
    def filter_func(self: AdapterLoader, adapter_name: str) -> Callable[[str], bool]:
        keep = original(self, adapter_name)
        configs = list(task_configs(self.model.adapters_config.get(adapter_name)))
        table = f"shared_parameters.{adapter_name}."
        ours = tuple(f"{table}{config.method.name}_stack" for config in configs)
        prefix = _prefix(self.model)
        base: set[str] = set()
        if any(map(trains_originals, configs)):
            base = {prefix + name for name in base_parameters(self.model.base_model)}

        def kept(key: str) -> bool:
            if any(start in key for start in ours):
                # An encoder-decoder has the same table three times, and safetensors refuses aliases.
                return key.startswith(prefix + table)
            return keep(key) or key.startswith(table) or key in base

        return kept

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


def _adapter_load(original: Any) -> Any:
    def load(self: AdapterLoader, adapter_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        known, setup = self.model.adapters_config, self.model.active_adapters
        before = set(known.adapters)
        try:
            return original(self, adapter_name_or_path, *args, **kwargs)
        except Exception as error:
            for added in set(known.adapters) - before:
                self.model.delete_adapter(added)
            known.active_setup = setup
            if isinstance(error, RuntimeError) and "size mismatch" in str(error):
                first = next(line for line in str(error).splitlines() if "size mismatch" in line)
                raise ConfigError(
                    f"the adapter in {adapter_name_or_path} does not fit this {type(self.model).__name__}, it was "
                    f"made for a model of another size: {first.strip()}"
                ) from error
            raise

    return load


def _fusion_filter_func(original: Any) -> Any:
    def filter_func(self: AdapterFusionLoader, adapter_fusion_name: str) -> Callable[[str], bool]:
        return lambda key: f"adapter_fusion_layer.{adapter_fusion_name}." in key

    return filter_func


def _fusion_rename_func(original: Any) -> Any:
    def rename_func(self: AdapterFusionLoader, old_name: str, new_name: str) -> Callable[[str], str]:
        return lambda key: key.replace(f"adapter_fusion_layer.{old_name}.", f"adapter_fusion_layer.{new_name}.")

    return rename_func


def _fusion_load(original: Any) -> Any:
    def load(
        self: AdapterFusionLoader, save_directory: str, load_as: Any = None, loading_info: Any = None, **kwargs: Any
    ) -> Any:
        folder = Path(save_directory)
        try:
            config = self.weights_helper.load_weights_config(save_directory)
        except (OSError, ValueError):
            if folder.is_dir() and any(folder.glob("*adapter_fusion*")):
                raise ConfigError(f"{save_directory} has no readable adapter_fusion_config.json.") from None
            return original(self, save_directory, load_as, loading_info, **kwargs)
        model, name = self.model, load_as or config["name"]
        if adapters_fusion.check_file(model, config, name) is None:
            return original(self, save_directory, load_as, loading_info, **kwargs)
        known = name in model.adapters_config.fusions
        before, setup = adapters_fusion.coefficients_of(model, name), model.active_adapters
        info: dict[str, list[str]] = {}
        try:
            result = original(self, save_directory, load_as, info, **kwargs)
            if info.get("missing_keys"):
                raise ValueError(f"it has no {', '.join(info['missing_keys'])}")
        except (OSError, RuntimeError, ValueError) as error:
            if known:
                model.load_state_dict(before, strict=False)
            elif name in model.adapters_config.fusions:
                model.delete_adapter_fusion(name)
            model.adapters_config.active_setup = setup
            if isinstance(error, PalAdaptersError):
                raise
            raise ConfigError(f"the fusion in {save_directory} cannot be loaded: {error}") from error
        if isinstance(loading_info, dict):
            for key, values in info.items():
                loading_info.setdefault(key, []).extend(values)
        return result

    return load
