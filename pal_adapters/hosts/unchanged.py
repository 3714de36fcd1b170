"""All-or-nothing changes of a torch model, whichever host it belongs to.

A change runs inside `all_or_nothing(model)`. If it raises, the model is put back: its modules, parameters (by
identity), buffers, hooks, training modes, `requires_grad` and plain attributes, and whatever else the caller names.
Tensors are not copied up front, as that would double the memory of every call: code that overwrites tensors in place
first passes them to `keep_values`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.blocks.walk import named_modules

_LEAVES = (Tensor, nn.Module, type, FunctionType, MethodType, ModuleType, str, bytes, int, float, type(None))


class _Snapshot:
    """The state of a model and of the objects that change with it, before a change."""

    def __init__(self, model: nn.Module, beside: Iterable[Any], modules: Iterable[nn.Module] | None) -> None:
        self._seen: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._requires_grad: list[tuple[Tensor, bool]] = []
        self._training: list[tuple[nn.Module, bool]] = []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        inside = named_modules(model).values()
        self._take_modules(inside if modules is None else modules)
        for module in inside:
            self._training.append((module, module.training))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._requires_grad.append((tensor, tensor.requires_grad))
        for thing in beside:
            self._take(thing)

    def _take_modules(self, modules: Iterable[nn.Module]) -> None:
        """Save the attributes of modules, and the containers in them with all containers inside.

        In one loop: a model has some ten modules for each adapter and block, with some fifteen containers each.
        """
        for module in modules:
            attributes = vars(module)
            self._attributes.append((attributes, attributes.copy()))
            found = list(attributes.values())
            for value in found:  # grows by what containers hold
                if not isinstance(value, (dict, list, set)) or isinstance(value, nn.Module):
                    continue
                if id(value) not in self._seen:
                    self._seen.add(id(value))
                    self._containers.append((value, value.copy() if value else ()))
                    found.extend(value.values() if isinstance(value, dict) else value)

    def _take(self, thing: Any) -> None:
        """Save an object and everything it refers to, down to modules and tensors."""
        if isinstance(thing, _LEAVES) or id(thing) in self._seen:
            return
        if isinstance(thing, (dict, list, set)):
            self._seen.add(id(thing))
            self._containers.append((thing, thing.copy()))
            for item in list(thing.values()) if isinstance(thing, dict) else thing:
                if not isinstance(item, _LEAVES):
                    self._take(item)
            return
        self._seen.add(id(thing))
        if isinstance(thing, tuple):
            for item in thing:
                self._take(item)
        if isinstance(getattr(thing, "__dict__", None), dict):
            self._attributes.append((vars(thing), dict(vars(thing))))
            for value in list(vars(thing).values()):
                self._take(value)

    def keep(self, tensor: Tensor) -> None:
        if id(tensor) not in self._values:
            self._values[id(tensor)] = (tensor, tensor.detach().clone())

    def restore(self) -> None:
        for attributes, saved in self._attributes:
            attributes.clear()
            attributes.update(saved)
        for container, saved in self._containers:
            container.clear()
            container.extend(saved) if isinstance(container, list) else container.update(saved)
        for module, mode in self._training:
            module.training = mode
        for tensor, flag in self._requires_grad:
            if tensor.requires_grad is not flag:
                tensor.requires_grad_(flag)
        with torch.no_grad():
            for tensor, value in self._values.values():
                if tensor.shape == value.shape and tensor.dtype == value.dtype and tensor.device == value.device:
                    tensor.copy_(value)
                else:
                    tensor.data = value


_OPEN: ContextVar[tuple[_Snapshot, ...]] = ContextVar("pal_adapters_open_snapshots", default=())


@contextmanager
def all_or_nothing(model: nn.Module, *beside: Any, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Restore a model if the body raises anything, `KeyboardInterrupt` included. May be nested.

    Args:
        model: the model; the attributes of its modules are saved, including lists, sets and dicts.
        beside: objects outside the module tree that change with the model, such as the host's configuration or the
            owners of hooks; they are saved with everything they refer to, down to modules and tensors.
        modules: the only modules that the change touches, apart from training modes and `requires_grad`; all by
            default.
    """
    snapshot = _Snapshot(model, beside, modules)
    token = _OPEN.set((*_OPEN.get(), snapshot))
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise
    finally:
        _OPEN.reset(token)


def keep_values(tensors: Iterable[Tensor]) -> None:
    """Copy tensors that are about to be overwritten in place, for every running `all_or_nothing` to restore."""
    open_snapshots = _OPEN.get()
    for tensor in tensors:
        for snapshot in open_snapshots:
            snapshot.keep(tensor)
