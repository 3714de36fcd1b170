"""The base class of the tuners, which extends PEFT's internals. `expectations.py` lists every touch."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from pal_adapters.blocks.sites import Block, find_blocks
from pal_adapters.blocks.survey import partial_reach
from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.hooks.in_place import require_untied
from pal_adapters.hooks.rows import RowPlan
from pal_adapters.hosts.base_files import in_adapter_file, with_base
from pal_adapters.hosts.in_place import check_beside, check_originals, put_originals_back
from pal_adapters.hosts.method import Method, Options, parameters_of
from pal_adapters.hosts.names import require_adapter_name
from pal_adapters.hosts.unchanged import keep_values

from .change import changing
from .config import TaskPeftConfig, check_kept_modules, choose_blocks, chooses
from .in_place import parts_of, require_present, saved_in_place, tensors_in_place
from .joint import (
    check_restorable,
    check_trainable,
    check_transformers_loading,
    is_joint,
    joint_names,
    mark_base,
    match_base,
    name_alone,
    pretrained_tensors,
    task_parameter_ids,
)
from .layer import ACTIVE, TaskTunerLayer, TunerLayer, plans_of, remove_adapter_name, tuner_layers
from .loading import BASE_PREFIX, adapter_tensors, check_tensors
from .loading_in_place import named_as_on_model, put_in_place
from .registry import method_of
from .registry import register as register
from .routing import Routing, check_batch

EXCLUDED = _ExcludedModule()
TRANSFORMERS_5 = Version(transformers.__version__) >= Version("5")


def matching_modules(config: TaskPeftConfig, model: nn.Module) -> tuple[dict[str, nn.Module], set[str]]:
    """The modules that a config selects, by LoRA's rules, and the names of those it excludes."""
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


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """Run the model without adapters, on its current base weights, which `train_base` may have changed."""
    tuner = model.base_model
    if not isinstance(tuner, TaskTuner):
        with model.disable_adapter():
            yield
        return
    BaseTuner.disable_adapter_layers(tuner)
    try:
        yield
    finally:
        tuner.enable_adapter_layers()


def _refuse_task_ids(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("task_ids") is not None:
        raise UnsupportedError(
            "task_ids is not supported, and PEFT drops it silently: pass adapter_names=[...] with one adapter name "
            "per example."
        )


def _watch_task_ids(tuner: TaskTuner) -> None:
    """Hook the `PeftModel` that will hold `tuner`, so that `task_ids` are noticed.

    `PeftModelFor*.forward` accepts `task_ids` but passes it on only for POLY, and a tuner never sees its `PeftModel`.
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
    """Base class of the tuners; each method has one."""

    method: Method
    prefix: str
    tuner_layer_cls: type[BaseTunerLayer] = TaskTunerLayer
    target_module_mapping: dict[str, list[str]] = {}
    # Pre-hook of `PeftModel.forward`; tuners that route by task override it.
    _on_task_ids = staticmethod(_refuse_task_ids)
    # Arguments meant for `_enable_peft_forward_hooks` only.
    forward_arguments: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._of_peft_model = isinstance(peft_config, dict)  # otherwise the tuner is only used to inject one adapter
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        self._plans = plans_of(model)
        if self._of_peft_model:  # which registers the tuner next
            _watch_task_ids(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):  # not an intermediate base class
            cls.prefix = f"{cls.method.name}_"

    # Where to attach

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: TaskPeftConfig, model_config: dict[str, Any]
    ) -> TaskPeftConfig:
        blocks = self.method.reachable(find_blocks(self.model, peft_config.sites))
        chosen, self._excluded = choose_blocks(peft_config, blocks)
        if not chooses(peft_config) and (reach := partial_reach(self.model, blocks)):
            warnings.warn(
                f"{self.method.name}: {reach} Pass target_modules=[...] to choose blocks by name, which also silences "
                "this warning, or sites={...} to name the modules of other blocks; see pal_adapters.describe_sites.",
                stacklevel=2,
            )
        ids = task_parameter_ids(self.model)
        values = self.method.prepare(peft_config, chosen, parameters_of(self.model, blocks, ids))
        for name, value in values.items():
            setattr(peft_config, name, value)
        self._chosen: dict[str, Block] = {block.name: block for block in chosen}
        self._shared: dict[int, nn.Module | None] = {}
        return peft_config

    def _check_target_module_exists(self, peft_config: TaskPeftConfig, key: str) -> Any:  # type: ignore[override]
        return EXCLUDED if key in self._excluded else key in self._chosen

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("state_dict", None)  # the config selects the blocks; the keys of a checkpoint add nothing
        config = self.peft_config[adapter_name]
        try:
            require_adapter_name("adapter_name", adapter_name)
            check_kept_modules(config, model)
            with changing(self, config, units=False):
                if isinstance(config, TaskPeftConfig):
                    config.check_base_model(self.get_model_config(model))
                if is_joint(config):
                    check_trainable(model)
                    if TRANSFORMERS_5 and not self._of_peft_model and isinstance(model, PreTrainedModel):
                        others = [name for name in self.peft_config if name != adapter_name]
                        check_transformers_loading(model, adapter_name, others, loads=config.inference_mode)
                        # transformers 5 overwrites them before any check
                        keep_values(pretrained_tensors(model).values())
                if isinstance(config, Options):
                    beside = [(name, other) for name, other in self.peft_config.items() if other is not config]
                    check_beside(adapter_name, config, beside)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                require_untied(model, [part for _, part in parts_of(model, adapter_name)])
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self._put(peft_config, adapter_name, target, target_name, parent, current_key)

    def _put(self, config: Any, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, path: str) -> None:
        """Give an adapter its modules at a target of the model.

        Args:
            config: the adapter's config.
            adapter_name: the adapter.
            target: the module that `_check_target_module_exists` chose; here, a block.
            name: its name in `parent`.
            parent: the module that holds it.
            path: its path in the model.
        """
        block = self._chosen[path]
        layer = target._modules.get(self.method.name)
        if layer is None:
            layer = cast("type[TaskTunerLayer]", self.tuner_layer_cls)(self.model, block)
            layer.train(self.model.training)
            target.add_module(self.method.name, layer)
        assert isinstance(layer, TaskTunerLayer)
        self._shared[block.stack] = layer.update_layer(adapter_name, config, self._shared.get(block.stack))
        self._freeze_inactive(layer, adapter_name)
        if not layer._all_available_adapter_names():
            layer.detach()

    def _freeze_inactive(self, layer: BaseTunerLayer, adapter_name: str) -> None:
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

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
        base = pretrained_tensors(model) if is_joint(config) else {}

        def dropped(key: str) -> bool:
            return key not in state_dict and any(
                f".{name}." in key or key.endswith(f".{name}") for name in unwanted_adapter_names
            )

        # PEFT drops every key that contains another adapter's name: with adapters "0" and "1", half of layer 0. Put
        # them back, as PEFT also takes `modules_to_save` from this dictionary.
        require_present(model, adapter_name)
        own = {key: value for key, value in adapter_tensors(model, adapter_name).items() if dropped(key)}
        own.update(saved_in_place(model, adapter_name, state_dict))
        state_dict.update(own)
        state_dict.update({key: value for key, value in base.items() if dropped(key)})
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        own_base = {name_alone(model, key, adapter_name): state_dict[key] for key in base if key in state_dict}
        selected.update(in_adapter_file(own_base, adapter_name, prefix=BASE_PREFIX))
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return remove_adapter_name(key, f"{cls.method.name}_", adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        base, state_dict = match_base(model, config, adapter_name, with_base(state_dict))
        state_dict = named_as_on_model(model, adapter_name, f"{cls.method.name}_", state_dict)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        meta = pretrained_tensors(model, tied="each") if is_joint(config) else ()
        state_dict = check_tensors(model, adapter_name, state_dict, meta)
        keep_values(old for old, _ in base)
        in_place = tensors_in_place(model, adapter_name)
        put_in_place(model, adapter_name, state_dict)
        state_dict = {name: value for name, value in state_dict.items() if name not in in_place}
        # Mamba's own hook renames one key with "embedding" in what it loads.
        base += [
            (own, state_dict[name])
            for name, own in adapter_tensors(model, adapter_name).items()
            if name in state_dict and not own.is_meta
        ]
        with torch.no_grad():
            for old, new in base:
                old.copy_(new)
        return state_dict

    # Deletion

    def delete_adapter(self, adapter_name: str) -> None:
        joint = is_joint(self.peft_config.get(adapter_name))
        check_originals(part for _, part in parts_of(self.model, adapter_name))
        super().delete_adapter(adapter_name)
        layers = [layer for _, layer in tuner_layers(self.model) if isinstance(layer, TunerLayer)]
        for layer in layers:
            layer.forget(adapter_name)
        left = [name for name in self.active_adapters if name in self.peft_config]
        if not left and self.peft_config:  # the first layer had no other adapter, but the model does
            left = [min(self.peft_config)]
        if left and any(layer.active_adapters != left for layer in layers):
            self.set_adapter(left[0] if len(left) == 1 else left)
        if joint and not joint_names(self.peft_config):
            added = task_parameter_ids(self.model)
            for parameter in self.model.parameters():
                if id(parameter) not in added:
                    parameter.requires_grad = False

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's own method, which would silently run the base model for an unknown name."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise UnknownAdapterError(
                f"adapter {unknown[0]!r} is not on the model, which has {list(self.peft_config)}."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def disable_adapter_layers(self) -> None:
        """PEFT's own method, if the result is the pretrained model.

        Raises:
            UnsupportedError: if an adapter trains the pretrained weights in place.
        """
        check_restorable(self.peft_config)
        super().disable_adapter_layers()

    def _check_merge_allowed(self) -> None:
        raise UnsupportedError(
            f"{self.method.name} cannot be merged into the base model: {self.method.unmergeable} Use unload() to get "
            "the base model back."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        with changing(self):
            put_originals_back(part for name in self.peft_config for _, part in parts_of(self.model, name))
            for _, layer in list(tuner_layers(self.model)):
                if isinstance(layer, TunerLayer):
                    layer.detach()
            return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: averaging the weights of two task modules does not average their outputs."""
        raise UnsupportedError(f"add_weighted_adapter is not supported for {self.method.name}.")

    # One adapter per example

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("task_ids") is not None:  # `generate`, and models without a task type
            _refuse_task_ids(self, args, kwargs)
        names = kwargs.pop("adapter_names", None)
        if names is None:  # a call of its own, also inside a call with names
            with self._plans.bound(ACTIVE):
                yield
            return
        # A list first: another thread may add an adapter meanwhile.
        known = [name for name, config in list(self.peft_config.items()) if method_of(config) is not None]
        with Routing(self.model, self._plans, names, known, args, kwargs).in_force():
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self._plans.value
        if isinstance(plan, RowPlan):
            check_batch(self.model, plan, args, kwargs)
        return super().forward(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own method, for adapters that do not attend.

        Raises:
            UnsupportedError: if an active adapter attends: it does not see the tokens of a paged cache.
        """
        for name in self.active_adapters:
            method = method_of(self.peft_config[name])
            if method is not None and (method.attends or method.network):
                raise UnsupportedError(
                    f"adapter {name!r} ({method.name}) attends, which generate_batch does not support: use generate()."
                )
        model: Any = self.model
        return model.generate_batch(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own method, which may repeat the examples of a batch."""
        plan = self._plans.value
        if isinstance(plan, RowPlan):
            plan.repeated = True
        return self.model.generate(*args, **kwargs)
