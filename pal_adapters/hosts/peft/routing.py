"""`adapter_names` in PEFT: mixed batches with one adapter name per example."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pal_adapters.blocks.walk import named_modules
from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.hooks.call import CallValue, bind_reruns, checkpoints
from pal_adapters.hooks.rows import RowPlan

from .layer import TunerLayer, entry

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")


class AdapterInput(NamedTuple):
    """`adapter_names` of a graph whose tasks are an input.

    Attributes:
        names: all adapters, each once.
        numbers: `[b]`, the position in `names` of each example's adapter.
    """

    names: tuple[str, ...]
    numbers: Tensor


def check_names(names: Any, known: Sequence[str]) -> tuple[str, ...]:
    """`adapter_names` as a tuple.

    Raises:
        UnsupportedError: if it is not a list of names.
        UnknownAdapterError: for a name that the model does not have.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise UnsupportedError(
            f"adapter_names={names!r} is not allowed: pass a list with one adapter name per example."
        )
    unknown = sorted({repr(name) for name in names if name not in known and name != "__base__"})
    if unknown:
        raise UnknownAdapterError(
            f"adapter_names has {', '.join(unknown)}, which the model does not have: use "
            f"{', '.join(map(repr, sorted(known)))} or '__base__' for the model without an adapter."
        )
    return tuple(names)


def _batch_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    named = (kwargs.get(name) for name in (getattr(model, "main_input_name", ""), *_INPUTS))
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


def generates(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether these arguments are for `generate`, which a `PeftModel` without a task type calls on the base model."""
    return bool(set(kwargs) - set(inspect.signature(type(model).forward).parameters))


def _select(value: Any, batch: int, index: Tensor) -> Any:
    return value.index_select(0, index) if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value


def _route(wrapper: ModulesToSaveWrapper, plan: RowPlan, *args: Any, **kwargs: Any) -> Any:
    """`ModulesToSaveWrapper.forward`, each example through its adapter's copy; PEFT's only supports linear modules."""
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    batch, plan = first.shape[0], plan.for_batch(first.shape[0])
    groups: dict[nn.Module, list[str]] = {}
    for name in plan.names:
        groups.setdefault(entry(wrapper.modules_to_save, name, wrapper.original_module), []).append(name)
    if len(groups) == 1:
        return next(iter(groups))(*args, **kwargs)
    if plan.input is not None:
        raise UnsupportedError(
            f"a graph with several tasks cannot have a {type(wrapper.original_module).__name__} per task from "
            'modules_to_save: export one task at a time, such as task_ids="rte".'
        )
    parts, rows = [], [plan.rows_of(names, first.device) for names in groups.values()]
    for module, index in zip(groups, rows, strict=True):
        part = module(
            *(_select(v, batch, index) for v in args), **{k: _select(v, batch, index) for k, v in kwargs.items()}
        )
        if not isinstance(part, Tensor):
            raise UnsupportedError(
                f"adapter_names is not supported with modules_to_save={type(module).__name__}, which returns a "
                f"{type(part).__name__}: only modules that return one tensor can be used in a mixed batch."
            )
        parts.append(part)
    return torch.cat(parts).index_select(0, torch.cat(rows).argsort())


class _Routed:
    """The `forward` of a `modules_to_save` module: with `adapter_names`, each example uses its adapter's copy."""

    def __init__(self, wrapper: ModulesToSaveWrapper, plans: CallValue) -> None:
        self.wrapper = wrapper
        self.plans = plans
        self.inner = wrapper.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.plans.value
        if isinstance(plan, RowPlan):
            return _route(self.wrapper, plan, *args, **kwargs)
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.wrapper).forward(self.wrapper, *args, **kwargs)


class Routing:
    """Lets every layer and every `modules_to_save` module apply to each example its own adapter.

    It holds for the thread that calls `in_force`, and for whatever activation checkpointing reruns for a call inside.

    Args:
        model: the base model.
        plans: where the model keeps the plan, see `plans_of`.
        names: the user's `adapter_names`.
        known: the model's adapters.
        args, kwargs: the other arguments of the call.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: CallValue,
        names: Any,
        known: Sequence[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        modules = list(named_modules(model).values())  # another thread may add an adapter meanwhile
        checkpointed = model.training and any(map(checkpoints, modules))
        numbers = names.numbers if isinstance(names, AdapterInput) else None
        names = names.names if isinstance(names, AdapterInput) else names
        self.plan = RowPlan(check_names(names, known), keep=not checkpointed, numbers=numbers)
        self.plan.repeated = generates(model, kwargs)
        # `PeftModelFor*.forward` does not pass all inputs here; `TaskTuner.forward` sees them.
        check_batch(model, self.plan, args, {name: kwargs[name] for name in _INPUTS if name in kwargs})
        # An adapter may have been added to a submodule, whose layers look there.
        places = (plans, *(m.plans for m in modules if isinstance(m, TunerLayer)))
        self._places = list({id(place): place for place in places}.values())
        for module in modules:
            if isinstance(module, ModulesToSaveWrapper) and not isinstance(module.__dict__.get("forward"), _Routed):
                module.__dict__["forward"] = _Routed(module, plans)
        if checkpointed:
            bind_reruns(modules, *self._places)
        if torch.is_grad_enabled():
            for module in modules:
                if isinstance(module, TunerLayer):
                    module.routes_training = True

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Route inside the `with` block."""
        before = [place.value for place in self._places]
        try:
            for place in self._places:
                place.value = self.plan
            yield
        finally:
            for place, value in zip(self._places, before, strict=True):
                if place.value is self.plan:  # as in `CallValue.bound`
                    place.value = value


def check_batch(model: nn.Module, plan: RowPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedError` unless there is one name per example, if the arguments show the batch size."""
    batch = _batch_size(model, args, kwargs)
    if plan.input is None and not plan.repeated and batch is not None and batch != len(plan.members):
        raise UnsupportedError(
            f"adapter_names has {len(plan.members)} names, but the batch has {batch} examples: pass one name "
            "per example."
        )
