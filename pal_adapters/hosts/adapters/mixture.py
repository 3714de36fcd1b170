"""Task modules and the host's bottlenecks in one composition, including its fusion."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from adapters.composition import AdapterCompositionBlock, Fuse
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from adapters.methods.modeling import ParallelAdapter
from torch import Tensor

from pal_adapters.errors import UnsupportedError
from pal_adapters.nn.unit import UnitInputs

from .composition import State, ValueComposition, grow
from .fusion import Combination, check_present, weigh
from .layer import TaskLayer
from .sources import added


class Mixture(ValueComposition):
    """Task modules and the host's bottlenecks in one composition, at one of the host's bottleneck layers.

    Each child reads its own input: a bottleneck the result of its own `pre_forward` (the host uses the first child's
    for all children), a task module the inputs of its method. In an adapter with both, the task module runs first.

    Args:
        bottleneck: the host's layer, after a sublayer.
        task_layer: the task layer of the same block.
    """

    def __init__(self, bottleneck: BottleneckLayer, task_layer: TaskLayer) -> None:
        super().__init__()
        self._bottleneck = bottleneck
        self._task_layer = task_layer
        # Task modules that act at another site are skipped here and run there.
        self._site = task_layer.site_of(bottleneck)
        self._layer_norm: Any = None
        self.adapters_config = bottleneck.adapters_config

    @property
    def adapter_modules(self) -> Collection:
        return [*self._bottleneck.adapters, *self._task_layer.pal_adapters]

    def add_adapter(self, adapter_name: str, layer_idx: int) -> bool:
        raise NotImplementedError("a mixture holds no modules")

    def acts(self, setup: AdapterCompositionBlock) -> bool:
        """Whether an adapter of the setup acts here."""
        host = any(name in self._bottleneck.adapters for name in setup.flatten())
        return host or self._task_layer.acts(setup, self._site)

    def forward(self, setup: AdapterCompositionBlock, value: Tensor, stream: Tensor | None, layer_norm: Any) -> Tensor:
        """The layer's output, `[b, n, d]`, given the sublayer's output `value` and the residual stream."""
        inputs = UnitInputs(batch=value.shape[0])
        if self._site == "residual":
            inputs = self._task_layer.attachment.take_inputs(value)
        self._layer_norm = layer_norm
        state = self.compose(setup, State(value, grow(inputs, value.shape[0], value.device), self._site or "", stream))
        return state.value if self._bottleneck.is_layer_hooked else self._close(state).value

    def _close(self, state: State) -> State:
        if state.closed:
            return state
        total = state.value if state.stream is None else state.value + state.stream
        return state._replace(value=total if self._layer_norm is None else self._layer_norm(total), closed=True)

    def even(self, states: list[State]) -> list[State]:
        return [self._close(s) for s in states] if any(s.closed for s in states) else states

    def compose_single(self, adapter_setup: str, state: State, lvl: int = 0) -> State:
        state = self._task_module(adapter_setup, state._replace(term=None))
        if adapter_setup in self._bottleneck.adapters:
            return self._through_bottleneck(adapter_setup, state)
        return state

    def _task_module(self, name: str, state: State) -> State:
        if not any(self._site in unit.sites for unit in self._task_layer.units(name)):
            return state
        if state.closed and self._layer_norm is not None:
            raise UnsupportedError(
                f"{name!r} cannot be stacked after an adapter with original_ln_after=False in a post-LN model: it "
                "adds before the norm. Stack it first."
            )
        if self._site != "residual":
            return self._task_layer.compose_single(name, state)
        zero = state._replace(value=torch.zeros_like(state.value))
        term = self._task_layer.compose_single(name, zero).value
        return state._replace(value=state.value + term, term=term)

    def _through_bottleneck(self, name: str, state: State) -> State:
        adapter = self._bottleneck.adapters[name]
        hidden, _, residual = adapter.pre_forward(state.value, state.stream, self._layer_norm)
        done = self._bottleneck.compose_single(name, BottleneckState(hidden, state.stream, residual, self._layer_norm))
        value = done.hidden_states
        if isinstance(adapter, ParallelAdapter):  # returns its term without the residual
            value = state.value + value
        term = done.bottleneck_up if state.term is None else state.term + done.bottleneck_up
        closed = not adapter.original_ln_after and not self._bottleneck.is_layer_hooked
        return state._replace(value=value, term=term, closed=closed)

    def compose_fuse(self, adapter_setup: Fuse, state: State, lvl: int = 0) -> State:
        layer = self._fusion(adapter_setup)
        if layer is None:
            return state
        if isinstance(layer, Combination):
            return self._combine(adapter_setup, layer, state, lvl)
        config, _ = self.adapters_config.get_fusion(adapter_setup.name)
        query, residual = self._query(adapter_setup, state, config)
        before = state._replace(term=None)
        terms = [self.child(adapter_setup, child, before, lvl).term for child in adapter_setup]
        present = [term for term in terms if term is not None]
        if not present:  # all left out in this block
            return state
        stacked = torch.stack(present).permute(1, 2, 0, 3)
        context = ForwardContext.get_context()
        wanted = bool(context is not None and context.output_adapter_fusion_attentions)
        output = layer(query, stacked, stacked, residual, output_attentions=wanted)
        if wanted:
            self._bottleneck._store_fusion_attentions(adapter_setup.name, output[-1])
        return state._replace(value=output[0] if wanted else output, term=None)

    def _combine(self, setup: Fuse, combination: Combination, state: State, lvl: int) -> State:
        before = state._replace(term=None)
        terms = [(row, self._added(setup, child, before, lvl)) for row, child in combination.rows(setup)]
        rows = [row for row, term in terms if term is not None]
        if len(rows) < len(terms):
            check_present(self.adapters_config, setup)
        if not rows:  # all left out in this block
            return state
        total = weigh(combination()[rows], [term for _, term in terms if term is not None])
        return state._replace(value=state.value + total, term=None)

    def _added(self, setup: Fuse, child: Any, before: State, lvl: int) -> Tensor | None:
        """What a source adds, `[b, n, d]`, or None if it is left out of this block."""
        if not isinstance(child, str):
            return self.child(setup, child, before, lvl).value - before.value
        if child not in self.adapter_modules:
            return None
        state = self._task_module(child, before)
        if child not in self._bottleneck.adapters:
            return state.term
        adapter = self._bottleneck.adapters[child]
        x, _, residual = adapter.pre_forward(state.value, state.stream, self._layer_norm)
        term = added(self._bottleneck, child, x, residual)
        return term if state.term is None else state.term + term

    def _fusion(self, setup: Fuse) -> Any:
        if setup.name in self._bottleneck.adapter_fusion_layer:
            return self._bottleneck.adapter_fusion_layer[setup.name]
        if setup.name not in self.adapters_config.fusions:
            raise UnsupportedError(f"{setup} is active, but there is no such fusion: call add_adapter_fusion first.")
        return None  # the layer of this fusion is elsewhere

    def _query(self, setup: Fuse, state: State, config: Any) -> tuple[Tensor, Tensor]:
        """Query and residual of a fusion, `[b, n, d]`, by the settings of its last bottleneck or else of `seq_bn`."""
        lasts = [child if isinstance(child, str) else child.last() for child in setup]
        bottlenecks = [name for name in lasts if name in self._bottleneck.adapters]
        if bottlenecks:
            adapter = self._bottleneck.adapters[bottlenecks[-1]]
            _, query, residual = adapter.pre_forward(state.value, state.stream, self._layer_norm, config)
            # The host adds the residual stream twice after parallel bottlenecks.
            return query, state.value if isinstance(adapter, ParallelAdapter) else residual
        if config["query_before_ln"]:
            return state.value, state.value
        total = state.value if state.stream is None else state.value + state.stream
        return (total if self._layer_norm is None else self._layer_norm(total)), state.value
