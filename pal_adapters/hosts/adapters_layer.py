"""The layer that a block of an `adapters` model gets, and what each composition means for it.

Built on `ComposableAdapterLayerBase` (adapters 1.3), the base class that the host offers to its own methods.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from adapters.composition import AdapterCompositionBlock, Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from adapters.context import AdapterSetup, ForwardContext
from adapters.methods.adapter_layer_base import AdapterLayerBase, ComposableAdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import ParallelAdapter
from torch import Tensor, nn

from ..errors import UnknownAdapterError, UnsupportedError
from ..units import TaskUnit, UnitInputs
from .adapters_config import TaskAdapterConfig, task_configs
from .attach import Attachment, BlockMask
from .batch import RowPlan, run_rows, run_unit, select_rows
from .methods import generator_for
from .sites import Block

COMPOSITIONS = [Stack, Fuse, Split, Parallel, BatchSplit, Average, MultiTask]


class State(NamedTuple):
    """What a composition carries along, all with the same rows.

    Attributes:
        value: `[b, n, d]`, the running value at a site.
        inputs: what task modules read.
        stream: `[b, n, d]`, the residual stream beside `value`; only in a `Mixture`.
        term: `[b, n, d]`, what the last bottleneck added, the summand of a fusion.
    """

    value: Tensor
    inputs: UnitInputs
    stream: Tensor | None = None
    term: Tensor | None = None


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present) if len(present) == len(tensors) else None


class ValueComposition(ComposableAdapterLayerBase):
    """The host's compositions, on values: `Stack` in order, `Average` of the results, the others by rows or tokens."""

    supported_compositions = COMPOSITIONS

    def vslice(self, state: State, slice_obj: Any) -> State:
        here = torch.arange(state.value.shape[0], device=state.value.device)[slice_obj]
        rows = here if state.inputs.rows is None else state.inputs.rows[here]
        mask = state.inputs.mask.select(rows) if isinstance(state.inputs.mask, BlockMask) else state.inputs.mask
        inputs = state.inputs.map(lambda t: t[slice_obj])._replace(mask=mask, rows=rows)
        stream, term = (None if t is None else t[slice_obj] for t in (state.stream, state.term))
        return State(state.value[slice_obj], inputs, stream, term)

    def repeat(self, state: State, channels: int) -> State:
        stream = None if state.stream is None else state.stream.repeat(channels, 1, 1)
        return State(
            state.value.repeat(channels, 1, 1), _grow(state.inputs, state.value.shape[0] * channels), stream
        )

    def pad_and_concat(self, states: list[State]) -> State:
        return State(
            torch.cat([s.value for s in states]),
            states[0].inputs,
            _cat([s.stream for s in states]),
            _cat([s.term for s in states]),
        )

    def mean(self, states: list[State], weights: Tensor) -> State:
        values = torch.stack([s.value for s in states])
        return states[0]._replace(value=(values * weights.to(values.dtype)).sum(0))

    def _child(self, parent: AdapterCompositionBlock, child: Any, state: State, lvl: int) -> State:
        if isinstance(child, AdapterCompositionBlock):
            self.check_composition_valid(parent, child, lvl)
            return self._get_compose_func(type(child))(child, state, lvl=lvl + 1)
        if child in self.adapter_modules:
            return self.compose_single(child, state, lvl=lvl + 1)
        return state

    def compose_average(self, adapter_setup: Average, state: State, lvl: int = 0) -> State:
        # The host weighs and then takes the mean, which divides twice; the weights are the average.
        states = [self._child(adapter_setup, child, state, lvl) for child in adapter_setup]
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
        for child, size in zip(adapter_setup, adapter_setup.splits):
            part = _tokens(state, start, start + size)
            parts.append(self._child(adapter_setup, child, part, lvl).value)
            start += size
        return state._replace(value=torch.cat(parts, dim=1))

    def compose_batch_split(self, adapter_setup: BatchSplit, state: State, lvl: int = 0) -> State:
        result = super().compose_batch_split(adapter_setup, state, lvl=lvl)
        return result._replace(inputs=state.inputs)

    def compose_parallel(self, adapter_setup: Parallel, state: State, lvl: int = 0) -> State:
        result = super().compose_parallel(adapter_setup, state, lvl=lvl)
        return result._replace(inputs=_grow(state.inputs, result.value.shape[0]))

    def compose_multi_task(self, adapter_setup: MultiTask, state: State, lvl: int = 0) -> State:
        names = task_names(adapter_setup, state.value.shape[0])
        groups: dict[Any, list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(name, []).append(row)
        value = state.value
        for name, members in groups.items():
            rows = torch.tensor(members, device=value.device)
            part = self._child(adapter_setup, name, self.vslice(state, rows), lvl)
            value = value.index_copy(0, rows, part.value)
        return state._replace(value=value)


def task_names(setup: MultiTask, batch: int) -> list[Any]:
    """The child of `MultiTask` that each row goes through, from `task_ids` of the forward call.

    Raises:
        UnknownAdapterError: for a task that is no child of the block.
        UnsupportedError: without `task_ids`, or with another number of them than rows.
    """
    children = list(setup.children)
    context = ForwardContext.get_context()
    ids = getattr(context, "task_ids", None)
    if ids is None:
        raise UnsupportedError(
            f"MultiTask({', '.join(map(str, children))}) is active but task_ids is None: pass task_ids to the model, "
            "one name or number a row."
        )
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    if len(ids) == 0 or batch % len(ids):
        raise UnsupportedError(f"task_ids has {len(ids)} entries, but the batch has {batch} rows: pass one a row.")
    names = []
    for task in ids:
        if task in children:
            names.append(task)
        elif isinstance(task, int) and 0 <= task < len(children):
            names.append(children[task])
        else:
            raise UnknownAdapterError(
                f"task_ids has {task!r}, which is no task of this MultiTask: use one of {children} or a number from 0 "
                f"to {len(children) - 1}."
            )
    # Beam search repeats every row.
    return [name for name in names for _ in range(batch // len(ids))]


def _plan(names: list[str], model: nn.Module) -> RowPlan:
    """The plan for these rows, one for all blocks of a forward pass."""
    context = ForwardContext.get_context()
    plan = getattr(context, "pal_adapters_plan", None)
    if plan is None or plan.names != tuple(names):
        plan = RowPlan(names, keep=not (model.training and model.is_gradient_checkpointing))
        if context is not None:
            context.pal_adapters_plan = plan
    return plan


def _grow(inputs: UnitInputs, batch: int) -> UnitInputs:
    """The inputs of a batch that the host repeated as a whole (`Parallel`)."""

    def tile(t: Tensor) -> Tensor:
        return t if t.shape[0] == batch else t.repeat(batch // t.shape[0], 1, 1)

    mask = inputs.mask
    if isinstance(mask, BlockMask):
        device = mask.device
        mask = mask.select(torch.arange(batch, device=device))
    return inputs.map(tile)._replace(mask=mask, batch=batch)


def _tokens(state: State, start: int, end: int) -> State:
    inputs = state.inputs
    if inputs.cache is not None:
        raise UnsupportedError("Split cannot be used while generating with a cache: pass use_cache=False.")
    mask = inputs.mask
    if isinstance(mask, BlockMask):
        mask = mask.slice_tokens(start, end, state.value.shape[1])
    stream = None if state.stream is None else state.stream[:, start:end]
    return State(state.value[:, start:end], inputs.map(lambda t: t[:, start:end])._replace(mask=mask), stream)


class TaskLayer(ValueComposition, nn.Module):
    """All task modules of one block of an `adapters` model.

    `pal_adapters.<adapter name>.<method>` holds the units: the host's loader saves, loads and renames what a container
    of this name holds. What the blocks of a stack share lies in the base model's `shared_parameters`, the host's own
    place for that.

    Args:
        model: the host's base model.
        block: the block.
    """

    adapter_modules_name = "pal_adapters"
    location_key = "task_layer"

    def __init__(self, model: nn.Module, block: Block) -> None:
        super().__init__()
        # Tuples keep what is only referred to out of the module tree.
        self._block = (block,)
        self._model = (model,)
        self.adapters_config = model.adapters_config
        self.pal_adapters = nn.ModuleDict()
        self.attachment = Attachment(model, block, self)
        self._site = ""
        layers = [m for m in block.module.modules() if isinstance(m, BottleneckLayer)]
        self._bottlenecks = tuple(layers)
        for layer in layers:
            layer.pal_adapters_task_layer = (self,)

    @property
    def block(self) -> Block:
        return self._block[0]

    @property
    def _shared(self) -> nn.ModuleDict:
        return self._model[0].shared_parameters  # type: ignore[return-value]

    def units(self, name: str) -> Iterator[TaskUnit]:
        """The units of an adapter in this block."""
        if name in self.pal_adapters:
            yield from self.pal_adapters[name].values()  # type: ignore[operator, misc]

    # The host's life cycle

    def add_adapter(self, adapter_name: str, layer_idx: int) -> bool:
        self.layer_idx = layer_idx
        units = nn.ModuleDict()
        for config in task_configs(self.adapters_config.get(adapter_name)):
            if layer_idx in config.leave_out:
                continue
            unit = self._new_unit(adapter_name, config)
            if unit is not None:
                units[config.method.name] = unit
        if not units:
            return False
        units.train(self.training)
        self.pal_adapters[adapter_name] = units
        return True

    def _new_unit(self, adapter_name: str, config: TaskAdapterConfig) -> TaskUnit | None:
        method, block = config.method, self.block
        unit = method.build(config, block)
        if unit is None:
            return None
        device = next(block.module.parameters()).device
        generator = generator_for(config.init_weights_seed, block)
        shared = method.build_shared(config, block)
        if shared is not None:
            prefix = f"{method.name}_stack{block.stack}_"
            if adapter_name not in self._shared:
                self._shared[adapter_name] = nn.ParameterDict()
            table = self._shared[adapter_name]
            if not any(key.startswith(prefix) for key in table):
                first = generator_for(config.init_weights_seed, replace(block, index=-1))
                shared.reset_parameters(identity=config.identity_init, generator=first)  # type: ignore[operator]
                for name, parameter in shared.named_parameters():
                    table[prefix + name.replace(".", "_")] = nn.Parameter(parameter.detach().to(device))
            names = [name for name, _ in shared.named_parameters()]
            unit.share(SharedWeights(self, adapter_name, {n: prefix + n.replace(".", "_") for n in names}))
        unit.reset_parameters(identity=config.identity_init, generator=generator)
        self.attachment.require(unit.sites, unit.needs)
        return unit.to(device)

    def average_adapter(
        self, adapter_name: str, input_adapters: dict[str, float], combine_strategy: str, **kwargs: Any
    ) -> bool:
        added = super().average_adapter(adapter_name, input_adapters, combine_strategy, **kwargs)
        if added and adapter_name in self._shared:
            with torch.no_grad():
                for key, target in self._shared[adapter_name].items():  # type: ignore[operator]
                    target.copy_(sum(w * self._shared[name][key] for name, w in input_adapters.items()))  # type: ignore[index]
        return added

    def enable_adapters(
        self, adapter_setup: AdapterCompositionBlock, unfreeze_adapters: bool, unfreeze_fusion: bool
    ) -> None:
        super().enable_adapters(adapter_setup, unfreeze_adapters, unfreeze_fusion)
        if not unfreeze_adapters:
            return
        for name in adapter_setup.flatten():
            # The host enables shared parameters of top-level children only.
            if name in self.pal_adapters and name in self._shared:
                for parameter in self._shared[name].parameters():
                    parameter.requires_grad = True
            if any(config.train_base for config in task_configs(self.adapters_config.get(name))):
                for parameter in base_parameters(self._model[0]).values():
                    parameter.requires_grad = True

    def freeze_adapter(self, adapter_name: str, freeze: bool = True) -> None:
        super().freeze_adapter(adapter_name, freeze)
        if adapter_name in self.pal_adapters and adapter_name in self._shared:
            for parameter in self._shared[adapter_name].parameters():
                parameter.requires_grad = not freeze

    def compose_fuse(self, adapter_setup: Fuse, state: State, lvl: int = 0) -> State:
        # The fusion layer is the host's, and so is the place: see `Mixture`.
        if self._site != "residual" and any(
            self._site in unit.sites for name in adapter_setup.flatten() for unit in self.units(name)
        ):
            raise UnsupportedError(
                f"Fuse({', '.join(adapter_setup.flatten())}) cannot be used: a fusion weighs terms that are added "
                "behind the feed-forward part, and one of these adapters acts elsewhere too."
            )
        if not self._bottlenecks:
            raise UnsupportedError("Fuse needs a model with 'bottleneck' among its adapter_methods.")
        return state

    def compose_single(self, adapter_setup: str, state: State, lvl: int = 0) -> State:
        value = state.value
        for unit in self.units(adapter_setup):
            if self._site in unit.sites:
                inputs = state.inputs._replace(slot=(adapter_setup, unit_name(unit)))
                value = run_unit(unit, self._site, value, inputs)
        return state._replace(value=value)

    def compose_multi_task(self, adapter_setup: MultiTask, state: State, lvl: int = 0) -> State:
        if not all(isinstance(child, str) for child in adapter_setup):
            return super().compose_multi_task(adapter_setup, state, lvl=lvl)
        return self._rows(task_names(adapter_setup, state.value.shape[0]), state)

    def compose_batch_split(self, adapter_setup: BatchSplit, state: State, lvl: int = 0) -> State:
        sizes = adapter_setup.batch_sizes
        if sum(sizes) != state.value.shape[0] or not all(isinstance(child, str) for child in adapter_setup):
            return super().compose_batch_split(adapter_setup, state, lvl=lvl)
        return self._rows([name for name, size in zip(adapter_setup, sizes) for _ in range(size)], state)

    def _rows(self, names: list[str], state: State) -> State:
        value, plan = state.value, _plan(names, self._model[0])
        methods = dict.fromkeys(m for name in set(names) if name in self.pal_adapters for m in self.pal_adapters[name])
        for method in methods:
            units = {
                name: self.pal_adapters[name][method]
                for name in set(names)
                if name in self.pal_adapters and method in self.pal_adapters[name]
            }
            inputs = state.inputs._replace(slot=("rows", method))
            value = run_rows(units, plan, self._site, value, inputs)
        return state._replace(value=value)

    # The runner of `Attachment`

    def get_active_setup(self) -> AdapterCompositionBlock | None:
        # The host restores its forward context when activation checkpointing re-runs a block, but not a setup that
        # `with AdapterSetup(...)` gave: keep that one in the forward context.
        context = ForwardContext.get_context()
        given = AdapterSetup.get_context()
        if context is not None:
            if given is not None:
                context.pal_adapters_setup = given
            elif getattr(context, "pal_adapters_setup", None) is not None:
                with context.pal_adapters_setup:
                    return super().get_active_setup()
        return super().get_active_setup()

    def is_active(self, site: str) -> bool:
        setup = self.get_active_setup()
        if setup is None or (site == "residual" and self.keeps_inputs()):
            return False
        return any(site in unit.sites for name in setup.flatten() for unit in self.units(name))

    def keeps_inputs(self) -> bool:
        setup = self.get_active_setup()
        return setup is not None and self.needs_mixture(setup)

    def needs_mixture(self, setup: AdapterCompositionBlock) -> bool:
        """See the function of this name."""
        theirs = {name for layer in self._bottlenecks for name in layer.adapters}
        return bool(self._bottlenecks) and needs_mixture(setup, set(self.pal_adapters), theirs)

    def run(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        setup = self.get_active_setup()
        assert setup is not None
        return self.compose_at(site, setup, State(value, _grow(inputs, value.shape[0]))).value

    def compose_at(self, site: str, setup: AdapterCompositionBlock | str, state: State) -> State:
        """Run a setup at one site."""
        self._site = site
        return self.compose(setup, state)


class SharedWeights(Mapping[str, Tensor]):
    """The projections of one adapter, read from where the host keeps them, so that replacing them there is seen."""

    def __init__(self, layer: TaskLayer, adapter_name: str, keys: dict[str, str]) -> None:
        self._layer = layer
        self._name = adapter_name
        self._keys = keys

    def __getitem__(self, key: str) -> Tensor:
        return self._layer._shared[self._name][self._keys[key]]  # type: ignore[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def unit_name(unit: TaskUnit) -> str:
    return type(unit).__name__


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The pretrained parameters of a host model by name: all but those of task modules, of any method."""
    task = {id(p) for p in task_parameters(model)}
    return {name: p for name, p in model.named_parameters() if id(p) not in task}


def task_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter that an adapter method, built in or ours, added to a host's base model."""
    for module in model.modules():
        if isinstance(module, AdapterLayerBase):
            containers = [module.adapter_modules, getattr(module, "adapter_fusion_layer", None)]
            for container in containers:
                if isinstance(container, nn.Module):
                    yield from container.parameters()
    for name in ("shared_parameters", "invertible_adapters", "prefix_tuning"):
        container = getattr(model, name, None)
        if isinstance(container, nn.Module):
            yield from container.parameters()


def needs_mixture(setup: AdapterCompositionBlock | str, ours: Collection[str], theirs: Collection[str]) -> bool:
    """Whether a setup has our adapters where the host's bottleneck layers cannot pass over them.

    That is so inside a `Fuse`, whose layer is the host's, and in a block beside bottlenecks of the host.
    """
    if isinstance(setup, str):
        return False
    mine = setup.flatten() & set(ours)
    if not mine:
        return False
    if isinstance(setup, Fuse):
        return True
    if setup.flatten() & set(theirs):
        blocks = [child for child in setup if not isinstance(child, str)]
        if not isinstance(setup, Stack) or any(not isinstance(b, Stack) and b.flatten() & mine for b in blocks):
            return True
    return any(needs_mixture(child, ours, theirs) for child in setup)


class Mixture(ValueComposition):
    """Our adapters and the host's bottlenecks in one composition, at one bottleneck layer of the host.

    Each child reads its own input: a bottleneck what its own `pre_forward` gives, a task module what its method says.

    Args:
        bottleneck: the host's layer, behind a sub-layer.
        task_layer: the layer of the same block.
    """

    def __init__(self, bottleneck: BottleneckLayer, task_layer: TaskLayer) -> None:
        super().__init__()
        self._bottleneck = bottleneck
        self._task_layer = task_layer
        # Task modules add behind the feed-forward part; behind attention they are passed over.
        self._acts = bottleneck.location_key == "output_adapter"
        self._layer_norm: Any = None
        self.adapters_config = bottleneck.adapters_config

    @property
    def adapter_modules(self) -> Collection:
        return [*self._bottleneck.adapters, *self._task_layer.pal_adapters]

    def forward(
        self, setup: AdapterCompositionBlock, value: Tensor, stream: Tensor | None, layer_norm: Any
    ) -> Tensor:
        """The layer's output, `[b, n, d]`, for the sub-layer's output `value` and the residual stream."""
        inputs = self._task_layer.attachment.take_inputs(value) if self._acts else UnitInputs()
        self._layer_norm = layer_norm
        state = self.compose(setup, State(value, _grow(inputs, value.shape[0]), stream))
        if self._bottleneck.is_layer_hooked:
            return state.value
        total = state.value if state.stream is None else state.value + state.stream
        return total if layer_norm is None else layer_norm(total)

    def _term_of_task_module(self, name: str, state: State) -> Tensor:
        zero = State(torch.zeros_like(state.value), state.inputs)
        return self._task_layer.compose_at("residual", name, zero).value

    def compose_single(self, adapter_setup: str, state: State, lvl: int = 0) -> State:
        if adapter_setup in self._bottleneck.adapters:
            adapter = self._bottleneck.adapters[adapter_setup]
            hidden, _, residual = adapter.pre_forward(state.value, state.stream, self._layer_norm)
            output = adapter(hidden, residual_input=residual)
            if isinstance(adapter, ParallelAdapter):  # gives its term without a residual
                value = state.value + output[0]
            else:
                value = output[0] if residual is state.value else state.value + (output[0] - residual)
            return state._replace(value=value, term=output[2])
        if not self._acts:
            return state
        term = self._term_of_task_module(adapter_setup, state)
        return state._replace(value=state.value + term, term=term)

    def compose_fuse(self, adapter_setup: Fuse, state: State, lvl: int = 0) -> State:
        if adapter_setup.name not in self._bottleneck.adapter_fusion_layer:
            return state
        config, _ = self.adapters_config.get_fusion(adapter_setup.name)
        query, residual = self._query(adapter_setup, state, config)
        terms = []
        for child in adapter_setup:
            term = self._child(adapter_setup, child, state, lvl).term
            if term is not None:
                terms.append(term)
        stacked = torch.stack(terms).permute(1, 2, 0, 3)
        layer = self._bottleneck.adapter_fusion_layer[adapter_setup.name]
        context = ForwardContext.get_context()
        wanted = bool(context is not None and context.output_adapter_fusion_attentions)
        output = layer(query, stacked, stacked, residual, output_attentions=wanted)
        if wanted:
            self._bottleneck._store_fusion_attentions(adapter_setup.name, output[-1])
        return state._replace(value=output[0] if wanted else output)

    def _query(self, setup: Fuse, state: State, config: Any) -> tuple[Tensor, Tensor]:
        bottlenecks = [name for name in setup.flatten() if name in self._bottleneck.adapters]
        for name in [child if isinstance(child, str) else child.last() for child in setup][::-1]:
            if name in bottlenecks:  # the last one's settings count, as in the host
                adapter = self._bottleneck.adapters[name]
                _, query, residual = adapter.pre_forward(state.value, state.stream, self._layer_norm, config)
                return query, residual
        total = state.value if state.stream is None else state.value + state.stream
        if config["query_before_ln"] or self._layer_norm is None:
            return (state.value if config["query_before_ln"] else total), state.value
        return self._layer_norm(total), state.value
