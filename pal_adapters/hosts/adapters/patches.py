"""Registration with `adapters`, and the only place where its internals are replaced.

Every symbol of adapters 1.3 that is replaced; wrappers that are not here are in `adapters_adding` (an adapter is
added), `adapters_files` (loaders) and `adapters_lora`:

| upstream symbol                                  | what and why                                                   |
|--------------------------------------------------|----------------------------------------------------------------|
| `AdapterConfig._get_config_class`                | wrapped: its table of architectures is closed                  |
| `AdapterMethod.get_from_config`                  | wrapped: a model's interface would have to list our methods;   |
|                                                  | whether they fit is found from the model instead               |
| `ADAPTER_CONFIG_MAP`                             | gets our strings                                               |
| `ADAPTERFUSION_CONFIG_MAP`                       | gets our strings                                               |
| `ModelAdaptersMixin.supports_adapter`            | wrapped: the answer for our configs is found from the model    |
| `ModelAdaptersMixin.add_adapter`                 | wrapped: says why one does not fit, where the host would not   |
| `ModelAdaptersMixin._add_adapter_weights`        | wrapped: gives blocks their `TaskLayer` before the first use   |
| `ModelAdaptersMixin.add_adapter_fusion`          | wrapped: reads our configs, which come from a file as the      |
|                                                  | host's class; refuses sets that cannot be fused, before they   |
|                                                  | count; links coefficients that blocks share                    |
| `ModelAdaptersMixin.init_adapters`               | wrapped: links them where a model comes with its fusions       |
| `ModelAdaptersMixin._load_adapter_setup_weights` | wrapped: a setup that cannot be loaded leaves the model as it  |
|                                                  | was                                                            |
| `ModelAdaptersMixin.merge_adapter`               | wrapped: the host passes over what it cannot merge             |
| `ModelAdaptersMixin._prepare_model_inputs`       | wrapped: generation repeats tensors for its beams, and leaves  |
|                                                  | a list of `task_ids` as short as it was                        |
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
`adapters_sources`, `adapters_penalty`; the weight of the penalty on their `value` is
`get_fusion_regularization_loss`'s),
`AdapterConfig` and `AdapterFusionConfig` (`adapters_config`, `adapters_fusion`).
`tests/hosts/adapters/test_touches.py` fails when one of them moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import adapters
from adapters import AdapterTrainer
from adapters.composition import Fuse
from adapters.configuration import ADAPTER_CONFIG_MAP, AdapterConfig
from adapters.configuration.adapter_fusion_config import ADAPTERFUSION_CONFIG_MAP
from adapters.interface import AdapterMethod
from adapters.loading import AdapterFusionLoader, AdapterLoader
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.lora import LoRALinear
from adapters.model_mixin import ModelAdaptersMixin, ModelWithHeadsAdaptersMixin
from packaging.version import Version
from torch import nn

from pal_adapters.errors import ConfigError, MissingHostError, UnknownAdapterError, UnsupportedError

from . import adding as adapters_adding
from . import files as adapters_files
from . import fusion as adapters_fusion
from . import lora as adapters_lora
from . import penalty as adapters_penalty
from . import setup as adapters_setup
from . import sources as adapters_sources
from . import trainer as adapters_trainer
from .composition import architectures
from .config import CONFIGS, TaskAdapterConfig, is_ours, task_configs
from .layer import TaskLayer, base_parameters, trains_base, unfusable
from .mixture import Mixture
from .network import with_task_tensor

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
        ADAPTERFUSION_CONFIG_MAP[name] = copy(preset)  # two names of one are not one object
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
    _wrap(ModelAdaptersMixin, "supports_adapter", adapters_adding.supports_adapter)
    _wrap(ModelAdaptersMixin, "add_adapter", adapters_adding.add_adapter)
    _wrap(ModelAdaptersMixin, "_add_adapter_weights", adapters_adding.add_adapter_weights)
    _wrap(ModelAdaptersMixin, "add_adapter_fusion", _add_adapter_fusion)
    _wrap(ModelAdaptersMixin, "init_adapters", _init_adapters)
    _wrap(ModelAdaptersMixin, "_load_adapter_setup_weights", adapters_setup.load_adapter_setup_weights)
    _wrap(ModelAdaptersMixin, "merge_adapter", _merge_adapter)
    _wrap(ModelAdaptersMixin, "_prepare_model_inputs", _prepare_model_inputs)
    _wrap(ModelWithHeadsAdaptersMixin, "freeze_embeddings", _freeze_embeddings)
    _wrap(ModelWithHeadsAdaptersMixin, "train_adapter_fusion", _train_adapter_fusion)
    _wrap(Fuse, "_get_save_kwargs", adapters_setup.fuse_kwargs)
    _wrap(BottleneckLayer, "bottleneck_layer_forward", _bottleneck_layer_forward)
    _wrap(BottleneckLayer, "add_fusion_layer", _add_fusion_layer)
    _wrap(BottleneckLayer, "compose_fuse", _compose_fuse)
    for name in ("pad_and_concat", "compose_average", "compose_multi_task"):
        _wrap(LoRALinear, name, getattr(adapters_lora, name))
    _wrap(AdapterLoader, "filter_func", adapters_files.filter_func)
    _wrap(AdapterLoader, "rename_func", adapters_files.rename_func)
    _wrap(AdapterLoader, "load", adapters_files.adapter_load)
    _wrap(AdapterFusionLoader, "filter_func", adapters_files.fusion_filter_func)
    _wrap(AdapterFusionLoader, "rename_func", adapters_files.fusion_rename_func)
    _wrap(AdapterFusionLoader, "load", adapters_files.fusion_load)
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


def _prepare_model_inputs(original: Any) -> Any:
    def wrapper(self: ModelAdaptersMixin, *args: Any, **kwargs: Any) -> Any:
        inputs, name, arguments = original(self, *args, **kwargs)
        return inputs, name, with_task_tensor(self.adapters_config, arguments)

    return wrapper


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
