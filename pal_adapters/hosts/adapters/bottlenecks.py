"""The forward pass of the host's bottleneck layers that contain task modules or fusions of this package."""

from __future__ import annotations

from typing import Any

from adapters.composition import Fuse
from adapters.methods.bottleneck import BottleneckLayer
from torch import nn

from pal_adapters.errors import UnknownAdapterError

from .fusion import Combination, compose
from .layer import TaskLayer
from .mixture import Mixture


def bottleneck_layer_forward(original: Any) -> Any:
    """`BottleneckLayer.bottleneck_layer_forward`, with compositions of task modules and bottlenecks."""

    def wrapper(self: BottleneckLayer, hidden_states: Any, residual_input: Any, layer_norm: Any) -> Any:
        task_layer: TaskLayer | None = getattr(self, "pal_adapters_task_layer", (None,))[0]
        if task_layer is None:
            return original(self, hidden_states, residual_input, layer_norm)
        if self.is_layer_hooked and isinstance(layer_norm, nn.Module):
            # The host borrows a norm of the block (in fact, of the last block): the package's hooks on it are not for
            # this call.
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


def compose_fuse(original: Any) -> Any:
    """`BottleneckLayer.compose_fuse`, with fusions of this package."""

    def wrapper(self: BottleneckLayer, adapter_setup: Fuse, state: Any, lvl: int = 0) -> Any:
        name = adapter_setup.name
        if name in self.adapter_fusion_layer and isinstance(self.adapter_fusion_layer[name], Combination):
            return compose(self, adapter_setup, state, lvl)
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
