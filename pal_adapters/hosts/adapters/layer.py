"""The layer that is added to each block of an `adapters` model.

It derives from `ComposableAdapterLayerBase` (adapters 1.3), the base class of the host's own methods.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from adapters.composition import AdapterCompositionBlock, BatchSplit, Fuse, MultiTask
from adapters.context import ForwardContext
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer
from torch import Tensor, nn

from pal_adapters.blocks.placement import computing_device
from pal_adapters.blocks.sites import Block, mark_added, resolve
from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.attachment import Attachment
from pal_adapters.hooks.call import checkpoints
from pal_adapters.hooks.in_place import InPlace
from pal_adapters.hooks.rows import RowPlan, run_rows, run_unit
from pal_adapters.hosts.in_place import put_originals_back
from pal_adapters.hosts.method import generator_for
from pal_adapters.nn.tracing import exporting
from pal_adapters.nn.unit import TaskUnit, UnitDict, UnitInputs

from .base_weights import base_parameters, task_parameters, trains_base
from .composition import State, ValueComposition, architectures, grow, task_children, task_input
from .config import TaskAdapterConfig, any_registered, fusable_methods, task_configs
from .in_force import check_call_known, setup_in_force, setup_is_given
from .network import LayerNetwork

mark_added(AdapterLayerBase)


class TaskLayer(ValueComposition, nn.Module):
    """All task modules of one block of an `adapters` model.

    The units are in `pal_adapters.<adapter name>.<method>`: the host's loader saves, loads and renames everything in a
    container of this name. Weights that the blocks of a stack share are in the base model's `shared_parameters`, where
    the host keeps shared weights.

    Args:
        model: the host's base model.
        block: the block.
    """

    adapter_modules_name = "pal_adapters"
    location_key = "task_layer"

    def __init__(self, model: nn.Module, block: Block) -> None:
        super().__init__()
        # The host's objects are untyped.
        self.adapters_config: Any = model.adapters_config
        self.pal_adapters: Any = nn.ModuleDict()
        self.attachment = Attachment(model, block, self)
        # In tuples, so that these references do not become submodules.
        self._bottlenecks = tuple(m for m in block.module.modules() if isinstance(m, BottleneckLayer))
        for layer in self._bottlenecks:
            layer.pal_adapters_task_layer = (self,)
        self.link(model, block)
        self.network: LayerNetwork | None = None
        # Whether there have been calls in an `AdapterSetup` in training.
        self._given = False

    def link(self, model: nn.Module, block: Block) -> None:
        """Set the model that holds the shared parameters, and the block as numbered in this model.

        An encoder and a decoder are separate models before the host combines them.
        """
        self._model = (model,)
        self._block = (block,)

    @property
    def model(self) -> nn.Module:
        """The host's base model."""
        return self._model[0]

    @property
    def block(self) -> Block:
        return self._block[0]

    @property
    def _shared(self) -> Any:
        return self._model[0].shared_parameters

    def units(self, name: str) -> Iterator[TaskUnit]:
        """An adapter's units in this block."""
        if name in self.pal_adapters:
            yield from self.pal_adapters[name].values()

    def methods(self, name: str) -> list[str]:
        """The methods of an adapter's units in this block."""
        return list(self.pal_adapters[name]) if name in self.pal_adapters else []

    # Called by the host

    def add_adapter(self, adapter_name: str, layer_idx: int) -> bool:
        self.layer_idx = layer_idx
        units = UnitDict()
        for config in task_configs(self.adapters_config.get(adapter_name)):
            unit = None if layer_idx in config.leave_out else config.method.build(config, self.block)
            if unit is not None:
                self._initialise(unit, adapter_name, config)
                units[config.method.name] = unit
        if not units:
            return False
        units.train(self.training)
        self.pal_adapters[adapter_name] = units
        return True

    def _initialise(self, unit: TaskUnit, adapter_name: str, config: TaskAdapterConfig) -> None:
        self._share(unit, adapter_name, config)
        generator = generator_for(config.init_weights_seed, self.block)
        unit.reset_parameters(identity=config.identity_init, generator=generator)
        unit.to(self._device)
        if config.method.network:
            self.network = self.network or LayerNetwork(self)
            # Only the last block's unit copies weights outside its block.
            copied = self.model if self.block.last else self.block.module
            self.network.complete(unit, config, {id(p) for p in task_parameters(copied)})
        else:
            self.attachment.require(unit.sites, unit.needs)

    @property
    def _device(self) -> torch.device:
        block = self.block.module
        return computing_device(block, next(block.parameters()).device)

    def in_place(self, adapter_name: str) -> list[InPlace]:
        """What an adapter trains of the pretrained weights of this block, and of those outside all blocks."""
        parts = [getattr(unit, "in_place", None) for unit in self.units(adapter_name)]
        return [part for part in parts if part is not None]

    def _train_in_place(self, adapter_name: str, mode: bool) -> None:
        for part in self.in_place(adapter_name):
            part.train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        put_originals_back(self.in_place(adapter_name))
        super().delete_adapter(adapter_name)
        if self.network is None:
            return
        if not any(unit.is_network for name in self.pal_adapters for unit in self.units(name)):
            self.network.remove()
            self.network = None

    def _share(self, unit: TaskUnit, adapter_name: str, config: TaskAdapterConfig) -> None:
        block = self.block
        shared = config.method.build_shared(config, block)
        if shared is None:
            return
        prefix = f"{config.method.name}_stack{block.stack}_"
        keys = {name: prefix + name.replace(".", "_") for name, _ in shared.named_parameters()}
        if adapter_name not in self._shared:
            self._shared[adapter_name] = nn.ParameterDict()
        table = self._shared[adapter_name]
        if not all(key in table for key in keys.values()):  # the first block of the stack
            first = generator_for(config.init_weights_seed, replace(block, index=-1))
            shared.reset_parameters(identity=config.identity_init, generator=first)  # type: ignore[operator]
            for name, parameter in shared.named_parameters():
                table[keys[name]] = nn.Parameter(parameter.detach().to(self._device))
        unit.share(SharedWeights(self, adapter_name, keys))

    def average_adapter(
        self, adapter_name: str, input_adapters: dict[str, float], combine_strategy: str, **kwargs: Any
    ) -> bool:
        added = super().average_adapter(adapter_name, input_adapters, combine_strategy, **kwargs)
        if added and adapter_name in self._shared:
            with torch.no_grad():
                for key, target in self._shared[adapter_name].items():
                    target.copy_(sum(w * self._shared[name][key] for name, w in input_adapters.items()))
        return added

    def enable_adapters(
        self, adapter_setup: AdapterCompositionBlock, unfreeze_adapters: bool, unfreeze_fusion: bool
    ) -> None:
        super().enable_adapters(adapter_setup, unfreeze_adapters, unfreeze_fusion)
        if not unfreeze_adapters:
            return
        for name in adapter_setup.flatten():
            # The host does not do this when it trains a fusion together with its adapters.
            if name in self.pal_adapters and name in self._shared:
                for parameter in self._shared[name].parameters():
                    parameter.requires_grad = True
            for unit in self.units(name):
                unit.mark_frozen()
            self._train_in_place(name, True)
        if trains_base(self.adapters_config, adapter_setup):
            for parameter in base_parameters(self._model[0]).values():
                parameter.requires_grad = True

    def freeze_adapter(self, adapter_name: str, freeze: bool = True) -> None:
        super().freeze_adapter(adapter_name, freeze)
        self._train_in_place(adapter_name, not freeze)
        if adapter_name in self.pal_adapters and adapter_name in self._shared:
            for parameter in self._shared[adapter_name].parameters():
                parameter.requires_grad = not freeze

    # Compositions

    def compose_fuse(self, adapter_setup: Fuse, state: State, lvl: int = 0) -> State:
        # The fusion layer belongs to one of the host's bottleneck layers: `Mixture` runs it if possible.
        reason = unfusable(sorted(adapter_setup.flatten()), self)
        if reason is not None:
            raise UnsupportedError(reason)
        return state

    def compose_single(self, adapter_setup: str, state: State, lvl: int = 0) -> State:
        value = state.value
        for unit in self.units(adapter_setup):
            if state.site in unit.sites:
                inputs = state.inputs._replace(slot=(adapter_setup, type(unit).__name__))
                value = run_unit(unit, state.site, value, inputs)
        return state._replace(value=value)

    def compose_multi_task(self, adapter_setup: MultiTask, state: State, lvl: int = 0) -> State:
        if not all(isinstance(child, str) for child in adapter_setup):
            return super().compose_multi_task(adapter_setup, state, lvl=lvl)
        if exporting():
            return self._rows(adapter_setup, list(adapter_setup), state, numbers=task_input(adapter_setup))
        children = task_children(adapter_setup, state.value.shape[0])
        return self._rows(adapter_setup, [adapter_setup[child] for child in children], state)

    def compose_batch_split(self, adapter_setup: BatchSplit, state: State, lvl: int = 0) -> State:
        sizes = adapter_setup.batch_sizes
        if exporting():
            raise UnsupportedError(
                f"{adapter_setup} cannot be exported, as the graph would be for {sum(sizes)} examples only: use "
                "MultiTask, whose task_ids are an input of the graph."
            )
        if sum(sizes) != state.value.shape[0] or not all(isinstance(child, str) for child in adapter_setup):
            return super().compose_batch_split(adapter_setup, state, lvl=lvl)
        names = [name for name, size in zip(adapter_setup, sizes, strict=True) for _ in range(size)]
        return self._rows(adapter_setup, names, state)

    def _rows(
        self, setup: AdapterCompositionBlock, names: list[str], state: State, numbers: Tensor | None = None
    ) -> State:
        value, plan = state.value, self._plan(setup, names, numbers)
        methods = {name: self.methods(name) for name in dict.fromkeys(names)}
        for method in dict.fromkeys(m for own in methods.values() for m in own):
            units = {name: self.pal_adapters[name][method] for name, own in methods.items() if method in own}
            value = run_rows(units, plan, state.site, value, state.inputs._replace(slot=("rows", method)))
        return state._replace(value=value)

    def _plan(self, setup: AdapterCompositionBlock, names: list[str], numbers: Tensor | None) -> RowPlan:
        """One plan for all blocks of a forward pass, so that tied projections are gathered only once."""
        context = ForwardContext.get_context()
        plans = {} if context is None else context.__dict__.setdefault("pal_adapters_plans", {})
        key = (id(setup), len(names))
        if key not in plans:
            model = self._model[0]
            again = model.training and any(map(checkpoints, model.modules()))
            plans[key] = RowPlan(names, keep=context is not None and not again, numbers=numbers)
        return plans[key]

    # `Runner`, for `Attachment`

    def setup(self) -> AdapterCompositionBlock | None:
        """The active setup, even if this block has none of its modules."""
        if self.adapters_config.skip_layers is not None and self.layer_idx in self.adapters_config.skip_layers:
            return None
        if setup_is_given():
            self._given |= self.training
        elif self._given:
            check_call_known(self.block.name)
        return setup_in_force(self.adapters_config.active_setup)

    def get_active_setup(self) -> AdapterCompositionBlock | None:
        setup = self.setup()
        # Looked up rather than iterated over: another thread may be adding an adapter.
        return setup if setup is not None and any(name in self.pal_adapters for name in setup.flatten()) else None

    def site_of(self, bottleneck: BottleneckLayer) -> str | None:
        """The site whose value one of the host's bottleneck layers receives, or None.

        A layer that the host hooks to a projection receives the sublayer's output, unless a norm comes in between
        (Gemma). A layer that the host's own block calls receives it unless the block first scales (BEiT) or normalises
        (X-MOD) it.
        """
        sites, block = self.block.sites, self.block.module
        hooked, place = bottleneck.is_layer_hooked, bottleneck.location_key
        if place == "mh_adapter":
            if resolve(block, sites.attention_output.rpartition(".")[0]) is bottleneck:
                return "attention"
            if getattr(block, "attention_adapters", None) is not bottleneck:
                return None  # after cross-attention; and ALBERT's receives the residual stream as its value
            scaled = next(block.parameters(recurse=False), None) is not None
            same = sites.attention_output == sites.attention if hooked else not scaled
            return "attention" if same else None
        if place != "output_adapter":
            return None
        if hooked:
            return "residual" if sites.residual_path == sites.ffn else None
        behind_block = sites.residual_path == "" and sites.norm == "pre"
        return "residual" if behind_block or sites.residual_path in (sites.ffn_output, "output_adapters") else None

    def acts(self, setup: AdapterCompositionBlock, site: str | None) -> bool:
        """Whether an adapter of the setup acts at a site of this block."""
        return any(site in unit.sites for name in setup.flatten() for unit in self.units(name))

    def mixed_setup(self) -> AdapterCompositionBlock | None:
        """The active setup if `Mixture` must run it: task modules in a `Fuse`, or combined with bottlenecks."""
        setup = self.setup()
        if setup is None or not self._bottlenecks:
            return None
        kinds = {name: architectures(self.adapters_config.get(name)) for name in setup.flatten()}
        ours = {name for name, kind in kinds.items() if any_registered(kind)}
        if ours and (any(None in kind for kind in kinds.values()) or fuses(setup, ours)):
            return setup
        return None

    def _mixes(self, site: str) -> bool:
        return any(self.site_of(b) == site for b in self._bottlenecks) and self.mixed_setup() is not None

    def is_active(self, site: str) -> bool:
        setup = self.get_active_setup()
        return setup is not None and self.acts(setup, site) and not self._mixes(site)

    def keeps_inputs(self) -> bool:
        return self._mixes("residual")

    def run(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        setup = self.get_active_setup()
        assert setup is not None
        inputs = grow(inputs, value.shape[0], value.device)
        state: State = self.compose(setup, State(value, inputs, site))  # type: ignore[operator]
        return state.value


class SharedWeights(Mapping[str, Tensor]):
    """One adapter's shared weights, read from the host's container at every access, so that replacing them works."""

    def __init__(self, layer: TaskLayer, adapter_name: str, keys: dict[str, str]) -> None:
        self._layer = layer
        self._name = adapter_name
        self._keys = keys

    def __getitem__(self, key: str) -> Tensor:
        return self._layer._shared[self._name][self._keys[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def fuses(setup: AdapterCompositionBlock | str, names: set[str]) -> bool:
    """Whether a setup contains one of these adapters inside a `Fuse`."""
    if isinstance(setup, str):
        return False
    if isinstance(setup, Fuse):
        return not setup.flatten().isdisjoint(names)
    return any(fuses(child, names) for child in setup)


def unfusable(names: Collection[str], layer: TaskLayer) -> str | None:
    """Why these adapters cannot be fused in this block, or None."""
    listed = f"Fuse({', '.join(names)}) cannot be used: "
    for name in names:
        for config in task_configs(layer.adapters_config.get(name)):
            if not config.method.fusable:
                return (
                    f"{listed}a fusion weights terms that are added after the feed-forward sublayer, but {name!r} "
                    f"({config.architecture}) acts elsewhere. Fuse bottlenecks, or adapters of type "
                    f"{', '.join(fusable_methods())}."
                )
    if not any(layer.site_of(b) == "residual" for b in layer._bottlenecks):
        return (
            f"{listed}the fusion runs in a bottleneck layer of adapters, and none in "
            f"{type(layer.block.module).__name__} receives the value to which task modules add."
        )
    return None
