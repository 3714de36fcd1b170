"""Registration with PEFT and the base of the tuners: where its internals are extended.

Every touch, for peft 0.21, also those in `peft_saved` (the last rows) and in the files of single ideas beside:

| upstream symbol                                   | what and why                                                   |
|---------------------------------------------------|----------------------------------------------------------------|
| `PeftType`                                        | gets a member a method: the enum is closed                     |
| `register_peft_method`                            | the host's own registration                                    |
| `BaseTuner._prepare_adapter_config`               | overridden: blocks are found from the model                    |
| `BaseTuner._check_target_module_exists`           | overridden: the host's `layers_to_transform` misses `layers.0` |
| `_ExcludedModule`                                 | the host's sign for a module that is left out on purpose       |
| `check_target_module_exists`                      | the host's matching, for module names as LoRA takes them       |
| `_maybe_include_all_linear_layers`                | the same, for `all-linear`                                     |
| `BaseTuner.inject_adapter`                        | extended: an error leaves the model as it was                  |
| `BaseTuner._create_and_replace`                   | overridden: the layer becomes a child of the block             |
| `BaseTuner._mark_only_adapters_as_trainable`      | extended: `train_base`                                         |
| `BaseTunerLayer.set_adapter`                      | extended: `train_base` follows the active adapters             |
| `BaseTunerLayer.enable_adapters`                  | the same                                                       |
| `BaseTunerLayer._get_base_layer_device_and_dtype` | overridden: packed weights                                     |
| `BaseTuner._get_adapter_state_dict`               | extended: `train_base`; adapters named like a module           |
| `BaseTuner._remove_adapter_name_from_key`         | overridden: several parts stand behind the adapter's name      |
| `BaseTuner._remap_adapter_state_dict_for_load`    | extended: `train_base`                                         |
| `BaseTuner.delete_adapter`                        | extended: no empty layer stays, one adapter is active in all   |
| `BaseTuner._check_merge_allowed`                  | overridden: refuses before anything changes                    |
| `BaseTuner._unload_and_optionally_merge`          | extended: takes our layers out                                 |
| `BaseTuner._enable_peft_forward_hooks`            | provided: `adapter_names`, in training too                     |
| `ModulesToSaveWrapper.forward`                    | replaced while `adapter_names` is in force: the host's mixes   |
|                                                   | single linear modules only, and no repeated rows               |
| `PeftModel.forward`                               | hooked, to refuse `task_ids` or to let them pass: the host     |
|                                                   | drops them silently                                            |
| `PeftModel.special_peft_forward_args`             | gets `task_ids` for tuners that route rows by it               |
| `register_module_module_registration_hook`        | (torch) shows us the `PeftModel` that holds a tuner            |
| `PreTrainedModel._hf_peft_config_loaded`          | reset if transformers' `add_adapter` failed on a plain model   |
| `PreTrainedModel._gradient_checkpointing_func`    | wrapped while `adapter_names` is in force, so that a block     |
|                                                   | that runs again has the same rows                              |
| `load_peft_weights`                               | reads the tensors of a saved adapter, from disk or the hub     |
| `get_peft_model_state_dict`                       | reads those of an adapter that is on the model                 |
| `get_pattern_key`                                 | the scaling of a LoRA adapter at a module                      |
| `LoraConfig`                                      | which LoRA adapters are more than `scaling * B A x`            |
| `PEFT_TYPE_TO_TUNER_MAPPING`                      | finds the method of a saved adapter of ours                    |

`tests/hosts/peft/test_touches.py` fails when one of them moves.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import peft
import torch
import transformers
from packaging.version import Version
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from pal_adapters.blocks.sites import Block, find_blocks
from pal_adapters.blocks.survey import partial_reach
from pal_adapters.errors import ConfigError, MissingHostError, UnsupportedError
from pal_adapters.hosts.method import Method, parameters_of

from .config import TaskPeftConfig, choose_blocks, chooses
from .joint import (
    base_tensors,
    check_trainable,
    check_transformers_loading,
    is_joint,
    load_base,
    mark_base,
    name_alone,
    task_parameter_ids,
)
from .layer import TaskTunerLayer, TunerLayer, remove_adapter_name, tuner_layers
from .routing import Routing
from .saved import adapter_on as adapter_on
from .saved import lora_extras as lora_extras
from .saved import lora_scaling as lora_scaling
from .saved import method_of as method_of
from .saved import read_adapter as read_adapter

EXCLUDED = _ExcludedModule()
_TRANSFORMERS_5 = Version(transformers.__version__) >= Version("5")


def register(method: Method, config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Make a method known to the host. Idempotent.

    Raises:
        ConfigError: if the host or another plugin owns the name already.
    """
    if Version(peft.__version__) < Version("0.21"):
        raise MissingHostError(f"peft {peft.__version__} is not supported: install 'peft>=0.21'.")
    name = method.name.upper()
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(name)  # type: ignore[call-overload]
    if known is config_class:
        return
    if known is not None or name in PeftType.__members__:
        raise ConfigError(f"PEFT has a method named {name!r} already ({known}).")
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    register_peft_method(name=method.name, config_cls=config_class, model_cls=tuner_class)


def matching_modules(config: TaskPeftConfig, model: nn.Module) -> tuple[dict[str, nn.Module], set[str]]:
    """The modules that a config names as it would for LoRA, and the names of those that it leaves out on purpose."""
    _maybe_include_all_linear_layers(config, model)
    inner = [f"{name}." for name, _ in tuner_layers(model)]
    found, excluded = {}, set()
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inner):
            continue
        match: Any = check_target_module_exists(config, name)
        if isinstance(match, _ExcludedModule):
            excluded.add(name)
        elif match:
            found[name] = module
    return found, excluded


def _refuse_task_ids(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("task_ids") is not None:
        raise UnsupportedError(
            "task_ids is not supported, and PEFT drops it silently: pass adapter_names=[...], one adapter name for "
            "each row."
        )


def _watch_task_ids(tuner: TaskTuner) -> None:
    """Give the `PeftModel` that is about to hold `tuner` a hook that sees `task_ids`.

    `PeftModelFor*.forward` takes `task_ids` and passes it on for POLY alone, and a tuner never meets its `PeftModel`.
    """
    reference = weakref.ref(tuner)

    def registered(module: nn.Module, name: str, child: Any) -> None:
        expected = reference()
        if expected is None or child is expected:
            handle.remove()
            if isinstance(module, PeftModel) and child is expected:
                module.register_forward_pre_hook(expected._on_task_ids, with_kwargs=True)
                module.special_peft_forward_args.update(expected.forward_arguments)

    handle = register_module_module_registration_hook(registered)


class TaskTuner(BaseTuner):
    """Base of the tuners: one for each method."""

    method: Method
    prefix: str
    tuner_layer_cls: type[BaseTunerLayer] = TaskTunerLayer
    target_module_mapping: dict[str, list[str]] = {}
    # A hook in front of `PeftModel.forward`; tuners that are steered by tasks replace it.
    _on_task_ids = staticmethod(_refuse_task_ids)
    # Arguments that only `_enable_peft_forward_hooks` is to see.
    forward_arguments: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._of_peft_model = isinstance(peft_config, dict)  # else it only serves to inject one adapter
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if self._of_peft_model:  # which registers the tuner next
            _watch_task_ids(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "method"):
            cls.prefix = f"{cls.method.name}_"

    # Where to attach

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: TaskPeftConfig, model_config: dict[str, Any]
    ) -> TaskPeftConfig:
        blocks = find_blocks(self.model, peft_config.sites)
        chosen, self._excluded = choose_blocks(peft_config, blocks)
        if not chooses(peft_config) and (reach := partial_reach(self.model)):
            warnings.warn(
                f"{self.method.name}: {reach} Pass target_modules=[...] to choose blocks by name, which also silences "
                "this warning, or sites={...} to name the modules of other blocks; see pal_adapters.describe_sites.",
                stacklevel=2,
            )
        ids = task_parameter_ids(self.model)
        added = [p for p in self.model.parameters() if id(p) in ids]
        values = self.method.prepare(peft_config, chosen, parameters_of(self.model, blocks, added))
        for name, value in values.items():
            setattr(peft_config, name, value)
        self._chosen: dict[str, Block] = {block.name: block for block in chosen}
        self._shared: dict[int, nn.Module | None] = {}
        return peft_config

    def _check_target_module_exists(self, peft_config: TaskPeftConfig, key: str) -> Any:  # type: ignore[override]
        return EXCLUDED if key in self._excluded else key in self._chosen

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("state_dict", None)  # the config names the blocks; the keys of a checkpoint would only repeat them
        config = self.peft_config[adapter_name]
        before = [(p, p.requires_grad) for p in model.parameters()]
        try:
            if is_joint(config):
                check_trainable(model)
                if _TRANSFORMERS_5 and not self._of_peft_model and hasattr(model, "load_adapter"):
                    others = [name for name in self.peft_config if name != adapter_name]
                    check_transformers_loading(model, adapter_name, others, loads=config.inference_mode)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            for _, layer in list(tuner_layers(model)):
                if isinstance(layer, TunerLayer):
                    layer.forget(adapter_name)
            for parameter, required in before:
                parameter.requires_grad = required
            if getattr(model, "_hf_peft_config_loaded", False) and not getattr(model, "peft_config", None):
                model._hf_peft_config_loaded = False  # type: ignore[assignment]
            raise

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: TaskPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        block = self._chosen[current_key]
        layer = target._modules.get(self.method.name)
        if layer is None:
            layer = cast("type[TaskTunerLayer]", self.tuner_layer_cls)(self.model, block)
            layer.train(self.model.training)
            target.add_module(self.method.name, layer)
        assert isinstance(layer, TaskTunerLayer)
        shared = layer.update_layer(adapter_name, peft_config, self._shared.get(block.stack))
        self._shared[block.stack] = shared
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        if not layer._all_available_adapter_names():
            layer.detach()

    # What trains and what is saved

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        active = [name for name in self.active_adapters if not self.peft_config[name].inference_mode]
        if any(is_joint(self.peft_config[name]) for name in active):
            mark_base(model, active, self.peft_config)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        base = base_tensors(model) if is_joint(config) else {}

        def dropped(key: str) -> bool:
            return key not in state_dict and any(
                f".{name}." in key or key.endswith(f".{name}") for name in unwanted_adapter_names
            )

        # The host drops every key with the name of another adapter in it: with adapters "0" and "1" half of layer 0.
        # What it selects and what it saves of `modules_to_save` next is taken from this dictionary.
        own = {key: value for key, value in _adapter_tensors(model, adapter_name).items() if dropped(key)}
        state_dict.update(own)
        state_dict.update({key: value for key, value in base.items() if dropped(key)})
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        selected.update({name_alone(model, key, adapter_name): state_dict[key] for key in base if key in state_dict})
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return remove_adapter_name(key, f"{cls.method.name}_", adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = load_base(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    # Taking it out again

    def delete_adapter(self, adapter_name: str) -> None:
        joint = is_joint(self.peft_config.get(adapter_name))
        super().delete_adapter(adapter_name)
        layers = [layer for _, layer in tuner_layers(self.model) if isinstance(layer, TunerLayer)]
        for layer in layers:
            layer.forget(adapter_name)
        left = [name for name in self.active_adapters if name in self.peft_config]
        if not left and self.peft_config:  # the first layer had no other adapter, but the model has
            left = [min(self.peft_config)]
        if left and any(layer.active_adapters != left for layer in layers):
            self.set_adapter(left[0] if len(left) == 1 else left)
        if joint and not any(map(is_joint, self.peft_config.values())):
            added = task_parameter_ids(self.model)
            for parameter in self.model.parameters():
                if id(parameter) not in added:
                    parameter.requires_grad = False

    def disable_adapter_layers(self) -> None:
        if any(is_joint(self.peft_config.get(name)) for name in self.active_adapters):
            warnings.warn(
                "The active adapter trains the pretrained weights (train_base=True): without it the model is not the "
                "original one.",
                stacklevel=2,
            )
        super().disable_adapter_layers()

    def _check_merge_allowed(self) -> None:
        raise UnsupportedError(
            f"{self.method.name} cannot be merged into the base model: {self.method.unmergeable} Use unload() to get "
            "the base model back."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for _, layer in list(tuner_layers(self.model)):
            if isinstance(layer, TunerLayer):
                layer.detach()
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not offered: averaging weights of two task modules is not the average of what they compute."""
        raise UnsupportedError(f"add_weighted_adapter is not supported for {self.method.name}.")

    # One adapter a row

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("task_ids") is not None:  # `generate`, and models without a task type
            _refuse_task_ids(self, args, kwargs)
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        known = [
            name for name, config in self.peft_config.items() if isinstance(getattr(config, "method", None), Method)
        ]
        self._routing = Routing(self.model, names, known, kwargs)
        try:
            with self._routing:
                yield
        finally:
            self._routing = None

    _routing: Routing | None = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which may repeat the rows of a batch."""
        if self._routing is not None:
            self._routing.repeated = True
        return self.model.generate(*args, **kwargs)


def _adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (TunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for container in module.adapter_layer_names:
            units = getattr(module, container, None)
            if isinstance(units, nn.ModuleDict) and adapter_name in units:
                prefix = f"{name}.{container}.{adapter_name}.".removeprefix(".")
                tensors.update(units[adapter_name].state_dict(prefix=prefix))
    return tensors
