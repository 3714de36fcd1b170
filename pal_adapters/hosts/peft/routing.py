"""`adapter_names` in PEFT: what holds while a batch goes through the model with one adapter name a row."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.hooks.call import CallValue, bind_reruns
from pal_adapters.hooks.rows import RowPlan

from .layer import TunerLayer, entry

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")


def check_names(names: Any, known: Sequence[str]) -> tuple[str, ...]:
    """`adapter_names` as a tuple.

    Raises:
        UnsupportedError: if it is not a list of names.
        UnknownAdapterError: for a name that the model does not have.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise UnsupportedError(f"adapter_names={names!r} is not allowed: pass a list with one adapter name a row.")
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
    """Whether these arguments are for `generate`, which `PeftModel` without a task type calls past the tuner."""
    return bool(set(kwargs) - set(inspect.signature(type(model).forward).parameters))


def _select(value: Any, batch: int, index: Tensor) -> Any:
    return value.index_select(0, index) if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value


def _route(wrapper: ModulesToSaveWrapper, plan: RowPlan, *args: Any, **kwargs: Any) -> Any:
    """`ModulesToSaveWrapper.forward`, each row through its adapter's copy; the host's takes linear modules alone."""
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    batch = first.shape[0]
    names = plan.for_batch(batch).names
    groups: dict[nn.Module, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(entry(wrapper.modules_to_save, name, wrapper.original_module), []).append(row)
    if len(groups) == 1:
        return next(iter(groups))(*args, **kwargs)
    parts = []
    for module, members in groups.items():
        index = torch.tensor(members, device=first.device)
        part = module(
            *(_select(v, batch, index) for v in args), **{k: _select(v, batch, index) for k, v in kwargs.items()}
        )
        if not isinstance(part, Tensor):
            raise UnsupportedError(
                f"adapter_names is not possible with modules_to_save on {type(module).__name__}, which returns a "
                f"{type(part).__name__}: only modules that return one tensor can be mixed in a batch."
            )
        parts.append(part)
    order = torch.tensor([row for members in groups.values() for row in members], device=first.device)
    return torch.cat(parts).index_select(0, order.argsort())


class _Routed:
    """The `forward` of a module to save: each row through its adapter's copy while `adapter_names` is in force."""

    def __init__(self, wrapper: ModulesToSaveWrapper, plans: CallValue) -> None:
        self.wrapper = wrapper
        self.plans = plans
        self.inner = wrapper.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.plans.value
        if plan is not None:
            return _route(self.wrapper, plan, *args, **kwargs)
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.wrapper).forward(self.wrapper, *args, **kwargs)


class Routing:
    """A context in which every layer of ours and every module to save treats each row with its own adapter.

    It holds for the thread that enters it, and for what activation checkpointing runs again for a call inside.

    Args:
        model: the base model.
        plans: its place for the plan, see `plans_of`.
        names: the user's `adapter_names`.
        known: adapters of the model.
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
        modules = list(model.modules())
        checkpointed = model.training and any(getattr(m, "gradient_checkpointing", False) for m in modules)
        self.plan = RowPlan(check_names(names, known), keep=not checkpointed)
        self.plan.repeated = generates(model, kwargs)
        # `PeftModelFor*.forward` keeps the inputs to itself here; `TaskTuner.forward` sees them.
        check_batch(model, self.plan, args, {name: kwargs[name] for name in _INPUTS if name in kwargs})
        # Layers of an adapter that was added to a part of the model ask that part.
        places = (plans, *(m.plans for m in modules if isinstance(m, TunerLayer)))
        self._places = list({id(place): place for place in places}.values())
        for module in modules:
            if isinstance(module, ModulesToSaveWrapper) and not isinstance(module.__dict__.get("forward"), _Routed):
                module.__dict__["forward"] = _Routed(module, plans)
        if checkpointed:
            bind_reruns(modules, *self._places)
        self._stack = ExitStack()

    def __enter__(self) -> Routing:
        for place in self._places:
            self._stack.enter_context(place.bound(self.plan))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def check_batch(model: nn.Module, plan: RowPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedError` for another number of names than rows, where the arguments tell the number of rows."""
    batch = _batch_size(model, args, kwargs)
    if not plan.repeated and batch is not None and batch != len(plan.names):
        raise UnsupportedError(
            f"adapter_names has {len(plan.names)} names, but the batch has {batch} rows: pass one name a row."
        )
