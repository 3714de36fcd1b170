"""Methods of a whole model of `adapters`: merging, freezing, generating, and which methods a config needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.configuration import AdapterConfig
from adapters.model_mixin import ModelAdaptersMixin, ModelWithHeadsAdaptersMixin
from torch import nn

from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.in_place import parts_in_place

from .base_weights import base_parameters, trains_base
from .config import CONFIGS, TaskAdapterConfig, task_configs
from .network import with_task_tensor


def get_config_class(original: Any) -> Any:
    """`AdapterConfig._get_config_class`, with this package's architectures."""

    def _get_config_class(config_dict: Mapping[str, Any]) -> type:
        ours = CONFIGS.get(config_dict.get("architecture") or "")
        return ours if ours is not None else original(config_dict)

    return _get_config_class


def get_from_config(original: Any) -> Any:
    """`AdapterMethod.get_from_config`; configs of this package need none of the host's methods."""

    def get_from_config(config: AdapterConfig) -> list[str]:
        return [] if isinstance(config, TaskAdapterConfig) else original(config)

    return get_from_config


def merge_adapter(original: Any) -> Any:
    """`ModelAdaptersMixin.merge_adapter`, which rejects adapters that cannot be merged."""

    def wrapper(self: ModelAdaptersMixin, name: str) -> None:
        for config in task_configs(self.adapters_config.get(name)):
            raise UnsupportedError(f"{name!r} cannot be merged into the base weights: {config.method.unmergeable}")
        original(self, name)

    return wrapper


def freeze_embeddings(original: Any) -> Any:
    """`ModelWithHeadsAdaptersMixin.freeze_embeddings`, which leaves alone what an adapter trains of the base."""

    def wrapper(self: ModelWithHeadsAdaptersMixin, freeze: bool = True) -> None:
        trained: list[nn.Parameter] = []
        if trains_base(self.adapters_config, self.adapters_config.active_setup):
            trained = [p for p in base_parameters(self.base_model).values() if p.requires_grad]
        for part in parts_in_place(self.base_model):
            trained += [p for p in part.tensors().values() if p.requires_grad]
        original(self, freeze)
        for parameter in trained:
            parameter.requires_grad = True

    return wrapper


def prepare_model_inputs(original: Any) -> Any:
    """`ModelAdaptersMixin._prepare_model_inputs`, with `task_ids` as a tensor, which beam search repeats."""

    def wrapper(self: ModelAdaptersMixin, *args: Any, **kwargs: Any) -> Any:
        inputs, name, arguments = original(self, *args, **kwargs)
        return inputs, name, with_task_tensor(self.adapters_config, arguments)

    return wrapper
