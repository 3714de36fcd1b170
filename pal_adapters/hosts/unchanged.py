"""All-or-nothing changes of a torch model, whichever host it belongs to.

A change runs inside `all_or_nothing(model)`. If it raises, the model is put back: its modules, parameters (by
identity), buffers, hooks, training modes, `requires_grad` and plain attributes, and whatever else the caller names.
Tensors are not copied up front, as that would double the memory of every call: code that overwrites tensors in place
first passes them to `keep_values`, or to `keep_on_disk` if there are many. `when_settled` says what to do once the
change is final or undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.blocks.walk import named_modules
from pal_adapters.hooks.stored import Stored

_LEAVES = (Tensor, nn.Module, type, FunctionType, MethodType, ModuleType, str, bytes, int, float, type(None))


_Step = Callable[[], None]


def _nothing() -> None:
    """The step of a change that leaves nothing to do."""


def _holder(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


class _Snapshot:
    """The state of a model and of the objects that change with it, before a change."""

    def __init__(self, model: nn.Module, beside: Iterable[Any], modules: Iterable[nn.Module] | None) -> None:
        self._seen: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._requires_grad: list[tuple[Tensor, bool]] = []
        self._training: list[tuple[nn.Module, bool]] = []
        self._values: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}
        self.settled: list[tuple[_Step, _Step]] = []
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
            for item in list(thing.values() if isinstance(thing, dict) else thing):  # threads may change it
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

    def lacks(self, tensor: Tensor) -> bool:
        return id(tensor) not in self._values

    def keep(self, tensor: Tensor, read: Callable[[], Tensor] | None = None) -> None:
        if self.lacks(tensor):
            self._values[id(tensor)] = (tensor, read or _holder(tensor.detach().clone()))

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
            for tensor, read in self._values.values():
                value = read()
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
        snapshot.settled = [(undone, undone) for _, undone in snapshot.settled]
        raise
    finally:
        _OPEN.reset(token)
        outer = _OPEN.get()
        if outer:  # the outermost change decides
            outer[-1].settled += snapshot.settled
        else:
            for final, _ in snapshot.settled:
                final()


def keep_values(tensors: Iterable[Tensor]) -> None:
    """Copy tensors that are about to be overwritten in place, for every running `all_or_nothing` to restore."""
    open_snapshots = _OPEN.get()
    for tensor in tensors:
        for snapshot in open_snapshots:
            snapshot.keep(tensor)


def keep_on_disk(tensors: Mapping[str, Tensor], stored: Stored | None = None) -> None:
    """`keep_values` for many tensors, whose values go to a temporary file that lasts as long as the changes.

    Args:
        tensors: the tensors by name.
        stored: a file that has these values already, and lasts.

    Raises:
        StorageError: if the file cannot be written.
    """
    lacking = [snapshot for snapshot in _OPEN.get() if any(map(snapshot.lacks, tensors.values()))]
    if not lacking:
        return
    if stored is None:
        stored = Stored(tensors)
        when_settled(stored.remove, stored.remove)
    for snapshot in lacking:
        for name, tensor in tensors.items():
            snapshot.keep(tensor, partial(stored.read, name))


def when_settled(final: Callable[[], None] = _nothing, undone: Callable[[], None] = _nothing) -> None:
    """What to do when the outermost running `all_or_nothing` has ended.

    Args:
        final: called if the change is there to stay; at once if none is running.
        undone: called if it has been undone.
    """
    open_snapshots = _OPEN.get()
    if open_snapshots:
        open_snapshots[-1].settled.append((final, undone))
    else:
        final()
