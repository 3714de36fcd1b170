"""Registration with PEFT, and the only place that touches its internals.

Every touch, for peft 0.21:

| upstream symbol                              | what and why                                                       |
|----------------------------------------------|--------------------------------------------------------------------|
| `PeftType`                                   | gets a member a method: the enum is closed                         |
| `register_peft_method`                       | the host's own registration                                        |
| `BaseTuner._prepare_adapter_config`,         | overridden: blocks are found from the model, and the host's        |
| `._check_target_module_exists`               | matching of `layers_to_transform` fails on names such as `layers.0`|
| `BaseTuner._create_and_replace`              | overridden: the layer becomes a child of the block                 |
| `BaseTuner._mark_only_adapters_as_trainable` | extended: `train_base`                                             |
| `BaseTuner._get_adapter_state_dict`,         | extended: `train_base`, and names with more than one part behind   |
| `._remove_adapter_name_from_key`             | the adapter's                                                      |
| `BaseTuner._unload_and_optionally_merge`,    | overridden: take our layers out; refuse to merge before anything   |
| `._check_merge_allowed`                      | changes                                                            |
| `BaseTuner._enable_peft_forward_hooks`       | provided: `adapter_names`, in training too                         |
| `AuxiliaryTrainingWrapper`                   | gets `adapter_names`, as LoRA gives it                             |
| `<module>._gradient_checkpointing_func`      | wrapped during a forward pass with `adapter_names` (transformers), |
|                                              | so that a block that runs again has the same rows                  |

`tests/hosts/test_peft_touches.py` fails when one of them moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import peft
import torch
from packaging.version import Version
from peft import PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils import register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import ConfigError, MissingHostError, UnknownAdapterError, UnsupportedError
from .batch import RowPlan
from .methods import Method, parameters_of
from .peft_config import TaskPeftConfig, choose_blocks
from .peft_layer import RowRouting, TaskTunerLayer, remove_adapter_name, tuner_layers
from .sites import Block, find_blocks


def register(method: Method, config_class: type[TaskPeftConfig], tuner_class: type[BaseTuner]) -> None:
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


def task_parameter_ids(model: nn.Module) -> set[int]:
    """Parameters that PEFT methods added, and copies that it trains: all but the pretrained ones."""
    ids: set[int] = set()
    for _, layer in tuner_layers(model):
        names = (*layer.adapter_layer_names, *layer.other_param_names)
        containers = [c for c in (getattr(layer, n, None) for n in names) if isinstance(c, (nn.Module, nn.ParameterDict))]
        ids |= {id(p) for c in containers for p in c.parameters()}
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            ids |= {id(p) for p in module.parameters()}
    return ids


@contextmanager
def _rows(layers: Sequence[RowRouting], plan: RowPlan | None) -> Iterator[None]:
    before = [layer.plan for layer in layers]
    try:
        for layer in layers:
            layer.plan = plan
        yield
    finally:
        for layer, value in zip(layers, before):
            layer.plan = value


def _give_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], *, names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _checkpoint_with_rows(function: Any, layers: Sequence[RowRouting], plan: RowPlan) -> Any:
    def checkpoint(block: Any, *args: Any, **kwargs: Any) -> Any:
        def again(*inner: Any, **inner_kwargs: Any) -> Any:
            with _rows(layers, plan):
                return block(*inner, **inner_kwargs)

        return function(again, *args, **kwargs)

    return checkpoint


class TaskTuner(BaseTuner):
    """Base of the tuners: one for each method."""

    method: Method
    prefix: str
    tuner_layer_cls: type[BaseTunerLayer]
    target_module_mapping: dict[str, list[str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "method"):
            cls.prefix = f"{cls.method.name}_"

    # Where to attach

    def _prepare_adapter_config(self, peft_config: TaskPeftConfig, model_config: dict[str, Any]) -> TaskPeftConfig:
        blocks = find_blocks(self.model, peft_config.sites)
        chosen, self._excluded = choose_blocks(peft_config, blocks)
        ids = task_parameter_ids(self.model)
        added = [p for p in self.model.parameters() if id(p) in ids]
        self.method.prepare(peft_config, chosen, parameters_of(self.model, blocks, added))
        self._chosen: dict[str, Block] = {block.name: block for block in chosen}
        self._shared: dict[int, nn.Module | None] = {}
        return peft_config

    def _check_target_module_exists(self, peft_config: TaskPeftConfig, key: str) -> Any:  # type: ignore[override]
        return _ExcludedModule() if key in self._excluded else key in self._chosen

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("state_dict", None)  # the config names the blocks; the keys of a checkpoint would only repeat them
        super().inject_adapter(model, adapter_name, *args, **kwargs)

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
        layer = getattr(target, self.method.name, None)
        if layer is None:
            layer = self.tuner_layer_cls(self.model, block)  # type: ignore[call-arg]
            layer.train(self.model.training)
            target.add_module(self.method.name, layer)
        shared = layer.update_layer(adapter_name, peft_config, self._shared.get(block.stack))
        self._shared[block.stack] = shared
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        if not layer._all_available_adapter_names():
            layer.detach()

    # What trains and what is saved

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        configs = [self.peft_config[name] for name in self.active_adapters]
        if any(c.train_base and not c.inference_mode for c in configs if isinstance(c, TaskPeftConfig)):
            added = task_parameter_ids(model)
            for parameter in model.parameters():
                if id(parameter) not in added and parameter.is_floating_point():
                    parameter.requires_grad = True

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.train_base:
            added = task_parameter_ids(model)
            base = [name for name, p in model.named_parameters() if id(p) not in added]
            selected.update({name: state_dict[name] for name in base if name in state_dict})
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return remove_adapter_name(key, f"{cls.method.name}_", adapter_name)

    # Taking it out again

    def _check_merge_allowed(self) -> None:
        raise UnsupportedError(
            f"{self.method.name} cannot be merged into the base model: {self.method.unmergeable} Use unload() to get "
            "the base model back."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for _, layer in list(tuner_layers(self.model)):
            if isinstance(layer, TaskTunerLayer):
                layer.detach()
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    # One adapter a row

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        rows = self._check_adapter_names(names)
        layers = [layer for _, layer in tuner_layers(self.model) if isinstance(layer, RowRouting)]
        checkpointed = self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        plan = RowPlan(rows, keep=not checkpointed)
        with ExitStack() as stack:
            stack.enter_context(_rows(layers, plan))
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    handle = module.register_forward_pre_hook(
                        lambda m, a, k: _give_adapter_names(m, a, k, names=list(rows)), with_kwargs=True
                    )
                    stack.callback(handle.remove)
                function = module.__dict__.get("_gradient_checkpointing_func")
                if function is not None and getattr(module, "gradient_checkpointing", False):
                    module._gradient_checkpointing_func = _checkpoint_with_rows(function, layers, plan)  # type: ignore[assignment]
                    stack.callback(setattr, module, "_gradient_checkpointing_func", function)
            yield

    def _check_adapter_names(self, names: Any) -> tuple[str, ...]:
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise UnsupportedError(f"adapter_names={names!r} is not allowed: pass a list with one adapter name a row.")
        known = {name for name, config in self.peft_config.items() if isinstance(config, TaskPeftConfig)}
        unknown = sorted({str(name) for name in names} - known - {"__base__"})
        if unknown:
            raise UnknownAdapterError(
                f"adapter_names has {', '.join(map(repr, unknown))}, which the model does not have: use "
                f"{', '.join(map(repr, sorted(known)))} or '__base__' for the model without an adapter."
            )
        return tuple(names)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not offered: averaging weights of two task modules is not the average of what they compute."""
        raise UnsupportedError(f"add_weighted_adapter is not supported for {self.method.name}.")
