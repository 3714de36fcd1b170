"""Adapters of PEFT that train pretrained weights in place: where these weights are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pal_adapters.blocks.walk import named_modules
from pal_adapters.hooks.in_place import PARTS, InPlace
from pal_adapters.hosts.method import Options

IN_PLACE = "base_weights='in_place'"
"""The setting of such adapters, for messages."""

_NAME = re.compile(rf"_units\.(?:{'|'.join(PARTS)})\.[^.]+$")


def is_in_place(config: Any) -> bool:
    """Whether an adapter trains some of the model's own pretrained weights."""
    return isinstance(config, Options) and config.train_base and config.base_weights == "in_place"


def parts_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, InPlace]]:
    """What an adapter trains in place, by the names of its units."""
    for name, module in named_modules(model, units=False).items():
        if not isinstance(module, BaseTunerLayer):
            continue
        for container in module.adapter_layer_names:
            units = getattr(module, container, None)
            if isinstance(units, nn.ModuleDict) and adapter_name in units:
                part = getattr(units[adapter_name], "in_place", None)
                if part is not None:
                    yield f"{name}.{container}.{adapter_name}.".removeprefix("."), part


def tensors_in_place(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The weights that an adapter trains in place, by the names that copies would have on the model."""
    return {
        f"{unit}{name}": tensor
        for unit, part in parts_of(model, adapter_name)
        for name, tensor in part.tensors().items()
    }


def saved_in_place(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that an adapter trains in place, as its file has them.

    Args:
        model: the model.
        adapter_name: the adapter.
        state_dict: what is being saved of the model, which may have been gathered from other processes.
    """
    own = tensors_in_place(model, adapter_name)
    names: dict[int, str] = {}
    for path, module in named_modules(model, units=False).items() if own else ():
        names.update((id(p), f"{path}.{name}".removeprefix(".")) for name, p in module._parameters.items())
    return {name: state_dict.get(names.get(id(tensor), ""), tensor.detach()) for name, tensor in own.items()}


def require_present(model: nn.Module, adapter_name: str) -> None:
    """Raise `UnsupportedError` if weights that an adapter trains in place have been replaced."""
    layers: list[Any] = list(named_modules(model, units=False).values())
    for layer in layers:
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "require_in_place"):
            layer.require_in_place(adapter_name)


def split(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a network's file: its pretrained weights, whether they were copies or in place, and the rest."""
    base = {name: tensor for name, tensor in state_dict.items() if _NAME.search(name)}
    return base, {name: tensor for name, tensor in state_dict.items() if name not in base}
