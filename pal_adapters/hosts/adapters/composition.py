"""The compositions of `adapters` applied to values: `Stack` in sequence, `Average` of results, others by example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from adapters.composition import AdapterCompositionBlock, Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from adapters.context import ForwardContext
from adapters.methods.adapter_layer_base import ComposableAdapterLayerBase
from torch import Tensor

from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.hooks.task_ids import is_number
from pal_adapters.nn.tracing import exporting
from pal_adapters.nn.unit import UnitInputs

COMPOSITIONS = [Stack, Fuse, Split, Parallel, BatchSplit, Average, MultiTask]


class State(NamedTuple):
    """The state that a composition passes along; all tensors have the same examples.

    Attributes:
        value: `[b, n, d]`, the running value at a site.
        inputs: what task modules read.
        site: the site in the block.
        stream: `[b, n, d]`, the residual stream that goes with `value`; only in a `Mixture`.
        term: `[b, n, d]`, what the last adapter added, which a fusion combines; only in a `Mixture`.
        closed: whether `value` already includes `stream`; only in a `Mixture`.
    """

    value: Tensor
    inputs: UnitInputs
    site: str
    stream: Tensor | None = None
    term: Tensor | None = None
    closed: bool = False


class ValueComposition(ComposableAdapterLayerBase):
    """The host's compositions of a `State`."""

    supported_compositions = COMPOSITIONS

    def vslice(self, state: State, slice_obj: Any) -> State:
        here = torch.arange(state.value.shape[0], device=state.value.device)[slice_obj]
        rows = here if state.inputs.rows is None else state.inputs.rows[here]
        inputs = with_rows(state.inputs.map(lambda t: t[slice_obj]), rows)
        stream = None if state.stream is None else state.stream[slice_obj]
        return state._replace(value=state.value[slice_obj], inputs=inputs, stream=stream, term=None)

    def repeat(self, state: State, channels: int) -> State:
        stream = None if state.stream is None else state.stream.repeat(channels, 1, 1)
        inputs = grow(state.inputs, state.value.shape[0] * channels, state.value.device)
        return state._replace(value=state.value.repeat(channels, 1, 1), inputs=inputs, stream=stream, term=None)

    def pad_and_concat(self, states: list[State]) -> State:
        states = self.even(states)
        streams = [s.stream for s in states if s.stream is not None]
        stream = torch.cat(streams) if streams else None
        return states[0]._replace(value=torch.cat([s.value for s in states]), stream=stream, term=None)

    def mean(self, states: list[State], weights: Tensor) -> State:
        states = self.even(states)
        values = torch.stack([s.value for s in states])
        return states[0]._replace(value=(values * weights.to(values.dtype)).sum(0), term=None)

    def even(self, states: list[State]) -> list[State]:
        """The same states, either all `closed` or none."""
        return states

    def child(self, parent: AdapterCompositionBlock, child: Any, state: State, lvl: int) -> State:
        """Run one child of a composition; an adapter that this layer does not have changes nothing."""
        if isinstance(child, AdapterCompositionBlock):
            self.check_composition_valid(parent, child, lvl)
            return self._get_compose_func(type(child))(child, state, lvl=lvl + 1)
        if child in self.adapter_modules:
            return self.compose_single(child, state, lvl=lvl + 1)
        return state

    def compose_average(self, adapter_setup: Average, state: State, lvl: int = 0) -> State:
        # The host multiplies by the weights and then takes the mean, which divides twice.
        states = [self.child(adapter_setup, child, state, lvl) for child in adapter_setup]
        weights = torch.tensor(adapter_setup.weights, device=state.value.device)[:, None, None, None]
        return self.mean(states, weights)

    def compose_split(self, adapter_setup: Split, state: State, lvl: int = 0) -> State:
        length = state.value.shape[1]
        if sum(adapter_setup.splits) != length:
            raise IndexError(
                f"splits={adapter_setup.splits} add up to {sum(adapter_setup.splits)}, but the sequence has {length} "
                "tokens."
            )
        parts, start = [], 0
        for child, size in zip(adapter_setup, adapter_setup.splits, strict=True):
            parts.append(self.child(adapter_setup, child, _tokens(state, start, start + size), lvl))
            start += size
        parts = self.even(parts)
        return state._replace(
            value=torch.cat([p.value for p in parts], dim=1), term=None, closed=any(p.closed for p in parts)
        )

    def compose_batch_split(self, adapter_setup: BatchSplit, state: State, lvl: int = 0) -> State:
        result = super().compose_batch_split(adapter_setup, state, lvl=lvl)
        return result._replace(inputs=state.inputs)

    def compose_parallel(self, adapter_setup: Parallel, state: State, lvl: int = 0) -> State:
        result = super().compose_parallel(adapter_setup, state, lvl=lvl)
        return result._replace(inputs=grow(state.inputs, result.value.shape[0], result.value.device))

    def compose_multi_task(self, adapter_setup: MultiTask, state: State, lvl: int = 0) -> State:
        if exporting():
            raise UnsupportedError(
                f"{adapter_setup} cannot be exported with task_ids as an input: use MultiTask of names of adapters of "
                "this package, or export one child at a time."
            )
        rows_of: dict[int, list[int]] = {}
        for row, child in enumerate(task_children(adapter_setup, state.value.shape[0])):
            rows_of.setdefault(child, []).append(row)
        rows = [torch.tensor(r, device=state.value.device) for r in rows_of.values()]
        parts = [
            self.child(adapter_setup, adapter_setup[child], self.vslice(state, r), lvl)
            for child, r in zip(rows_of, rows, strict=True)
        ]
        together = self.pad_and_concat(parts)
        # Back to batch order, in a new tensor, because autograd may need the old value.
        value = together.value.index_select(0, torch.cat(rows).argsort())
        return state._replace(value=value, term=None, closed=together.closed)


def task_input(setup: MultiTask) -> Tensor:
    """`task_ids` of a graph that has them as an input, `[b]`.

    Raises:
        UnsupportedError: for anything but an integer tensor.
    """
    ids = getattr(ForwardContext.get_context(), "task_ids", None)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 1:
        raise UnsupportedError(
            f"{setup} is active, and task_ids is no input of the graph: pass task_ids as an integer tensor of shape "
            "[batch] among the inputs."
        )
    return ids.long()


def task_children(setup: MultiTask, batch: int) -> list[int]:
    """The index of the `MultiTask` child for each example, from `task_ids` of the forward call.

    Raises:
        UnknownAdapterError: for a task that is not a child of the composition.
        UnsupportedError: without `task_ids`, or if there is not one per example.
    """
    context = ForwardContext.get_context()
    # Every site of every block asks: read `task_ids`, which may be on a GPU, once per forward pass.
    known: dict[tuple[int, int], list[int]] = {}
    if context is not None:
        known = context.__dict__.setdefault("pal_adapters_tasks", known)
    key = (id(setup), batch)
    if key not in known:
        known[key] = _task_children(setup, batch, getattr(context, "task_ids", None))
    return known[key]


def _task_children(setup: MultiTask, batch: int, ids: Any) -> list[int]:
    children = list(setup)
    if ids is None:
        raise UnsupportedError(
            f"MultiTask({', '.join(map(str, children))}) is active but task_ids is None: pass task_ids to the model, "
            "one name or number per example."
        )
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    if len(ids) == 0 or batch % len(ids):
        raise UnsupportedError(
            f"task_ids has {len(ids)} entries, but the batch has {batch} examples: pass one per example."
        )
    rows = []
    for task in ids:
        if isinstance(task, str) and task in children:
            rows.append(children.index(task))
        elif is_number(task) and 0 <= task < len(children):
            rows.append(int(task))
        else:
            raise UnknownAdapterError(
                f"task_ids has {task!r}, which is not a task of this MultiTask: use one of {children} or a number "
                f"from 0 to {len(children) - 1}."
            )
    # Beam search repeats every example.
    return [child for child in rows for _ in range(batch // len(ids))]


def with_rows(inputs: UnitInputs, rows: Tensor) -> UnitInputs:
    """`inputs` for tensors that hold only these examples of the batch."""
    return inputs._replace(mask=inputs.mask.select(rows), rows=rows)


def grow(inputs: UnitInputs, batch: int, device: torch.device) -> UnitInputs:
    """The inputs for a batch that the host has repeated as a whole (`Parallel`)."""
    held = [t.shape[0] for t in (inputs.x, inputs.raw, inputs.h) if t is not None]
    if held and all(size == batch for size in held):
        return inputs

    def tile(t: Tensor) -> Tensor:
        return t if t.shape[0] == batch else t.repeat(batch // t.shape[0], 1, 1)

    rows = torch.arange(batch, device=device)
    return inputs.map(tile)._replace(mask=inputs.mask.select(rows), batch=batch)


def _tokens(state: State, start: int, end: int) -> State:
    inputs = state.inputs
    if inputs.cache is not None:
        raise UnsupportedError("Split is not supported with a generation cache: pass use_cache=False.")
    mask = inputs.mask.slice_tokens(start, end, state.value.shape[1])
    stream = None if state.stream is None else state.stream[:, start:end]
    inputs = inputs.map(lambda t: t[:, start:end])._replace(mask=mask)
    return state._replace(value=state.value[:, start:end], inputs=inputs, stream=stream, term=None)


def architectures(config: Mapping[str, Any] | None) -> set[str | None]:
    """The architectures of an adapter's config, or of a union's members; None stands for the host's bottleneck."""
    if config is None:
        return set()
    if config.get("architecture") == "union":
        return {member.get("architecture") for member in config["configs"]}
    return {config.get("architecture")}
