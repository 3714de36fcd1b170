"""Adapters of `adapters` that train pretrained weights in place: where these weights are."""

from __future__ import annotations

from typing import Any

from torch import nn

from pal_adapters.blocks.walk import named_modules
from pal_adapters.hooks.in_place import InPlace

from .layer import TaskLayer


def parts_of(model: Any, adapter_name: str) -> list[InPlace]:
    """What an adapter trains in place of a model's pretrained weights, by block."""
    layers = [getattr(layer, "task_layer", None) for _, layer in model.iter_layers()]
    return [part for layer in layers if isinstance(layer, TaskLayer) for part in layer.in_place(adapter_name)]


def require_present(model: Any, adapter_name: str) -> None:
    """Raise `UnsupportedError` if weights that an adapter trains in place have been replaced."""
    for _, block in model.iter_layers():
        layer = getattr(block, "task_layer", None)
        if isinstance(layer, TaskLayer):
            for part in layer.in_place(adapter_name):
                part.require_present(block, layer.model)


def tensors_in_place(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that adapters of a model train in place, by the names that copies would have."""
    return {
        f"{path}.{name}": tensor
        for path, module in named_modules(model, once=False).items()
        if isinstance(part := module.__dict__.get("in_place"), InPlace)
        for name, tensor in part.tensors().items()
    }
