"""The host's LoRA in compositions with task modules: its layer expects LoRA in every child."""

from __future__ import annotations

from typing import Any

import torch
from adapters.composition import AdapterCompositionBlock, Average, MultiTask
from adapters.context import ForwardContext
from torch import Tensor

from pal_adapters.errors import UnsupportedError

from .composition import architectures, task_children
from .config import any_registered


def _has_ours(layer: Any, setup: AdapterCompositionBlock) -> bool:
    return any(any_registered(architectures(layer.adapters_config.get(name))) for name in setup.flatten())


def complete_states(layer: Any, states: list[Any]) -> list[Any]:
    """The states of the children; a child without LoRA gets one that leaves the layer's output unchanged.

    Raises:
        UnsupportedError: for DoRA, which scales the whole output.
    """
    present = [state for state in states if state.hidden_states is not None]
    if not present or len(present) == len(states):
        return states
    like, last = present[-1].hidden_states, present[-1].last
    lora = layer.loras[last]
    if lora.use_dora:
        raise UnsupportedError(
            f"{last!r} (DoRA) scales all examples of a batch, so none of them may belong to an adapter without DoRA."
        )
    neutral = 0.0 if lora.composition_mode == "add" else 1.0

    def filled(state: Any) -> Any:
        if state.hidden_states is not None:
            return state
        hidden = like.new_full((state.layer_input.shape[0], *like.shape[1:]), neutral)
        return state._replace(hidden_states=hidden)

    # The host takes the last LoRA from the last state.
    return [filled(state)._replace(last=last) for state in states]


def pad_and_concat(original: Any) -> Any:
    """`LoRALinear.pad_and_concat`, with children without LoRA."""

    def wrapper(self: Any, states: list[Any]) -> Any:
        return original(self, complete_states(self, states))

    return wrapper


def compose_average(original: Any) -> Any:
    """`LoRALinear.compose_average`, with children without LoRA."""

    def wrapper(self: Any, adapter_setup: Average, state: Any, lvl: int = 0) -> Any:
        if not _has_ours(self, adapter_setup):
            return original(self, adapter_setup, state, lvl=lvl)
        # The host skips children without LoRA, and divides by their number a second time.
        states = []
        for child in adapter_setup:
            if isinstance(child, AdapterCompositionBlock):
                self.check_composition_valid(adapter_setup, child, lvl)
                states.append(self._get_compose_func(type(child))(child, state, lvl=lvl + 1))
            else:
                states.append(self.compose_single(child, state, lvl=lvl + 1) if child in self.loras else state)
        states = complete_states(self, states)
        hidden: list[Tensor] = [w * s.hidden_states for w, s in zip(adapter_setup.weights, states, strict=True)]
        return states[-1]._replace(hidden_states=torch.stack(hidden).sum(0))

    return wrapper


def compose_multi_task(original: Any) -> Any:
    """`LoRALinear.compose_multi_task`, with children without LoRA."""

    def wrapper(self: Any, adapter_setup: MultiTask, state: Any, lvl: int = 0) -> Any:
        if not _has_ours(self, adapter_setup):
            return original(self, adapter_setup, state, lvl=lvl)
        # The host takes a tensor or names, but neither checks them nor repeats them for beams.
        context = ForwardContext.get_context()
        given = context.task_ids
        children = task_children(adapter_setup, self._bsz(state))
        context.task_ids = torch.tensor(children, device=state.layer_input.device)
        try:
            return original(self, adapter_setup, state, lvl=lvl)
        finally:
            context.task_ids = given

    return wrapper
