"""Selects the adapter of a pass through the backbone, leaving no trace on the model wherever the host allows it.

* `adapters`: the host's own `AdapterSetup`, which is local to the thread.
* PEFT, methods of this package: `adapter_names`, an argument of the call.
* PEFT, everything else: the host keeps the active adapter in its layers. Passes with the same adapter run
  concurrently; one with another adapter waits until they have finished.

With activation checkpointing a block runs again in the backward pass, possibly in another thread and after passes of
other tasks. It then runs under the setup of its own pass.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from pal_adapters.hooks.call import CallValue, bind_reruns

Enter = Callable[[], AbstractContextManager[None]]


class _Pass(CallValue):
    """The setup of the pass that this thread is in. A recomputed block enters it again."""

    @contextmanager
    def bound(self, value: Enter | None) -> Iterator[None]:
        with super().bound(value), nullcontext() if value is None else value():
            yield


class _Context:
    """The `ForwardContext` of `adapters`. Its own checkpointing restores it; wrappers of torch do not."""

    @property
    def value(self) -> Any:
        context = sys.modules.get("adapters.context")
        return None if context is None else context.ForwardContext.get_context()

    def bound(self, value: Any) -> AbstractContextManager[Any]:
        return nullcontext() if value is None else value


_PASS = _Pass()
_CONTEXT = _Context()


@contextmanager
def pass_under(backbone: nn.Module, enter: Enter) -> Iterator[None]:
    """One pass through the backbone under a setup, which blocks recomputed later enter again."""
    if backbone.training:
        bind_reruns(backbone.modules(), _PASS, _CONTEXT)
    with _PASS.bound(enter):
        yield


def adapter_setup(setup: Any) -> AbstractContextManager[Any]:
    """A pass of `adapters` through a composition, or through the base model alone for `None`."""
    from adapters.context import AdapterSetup  # only here: other hosts do without `adapters`

    return AdapterSetup(setup)


class _Turns:
    """Decides which passes may use a model whose host keeps the active adapter in its layers."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.key: object = None
        self.users = 0
        self.disabled = ExitStack()


_TURNS: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


@contextmanager
def active_in_peft(backbone: Any, adapter: str | None, key: object = None) -> Iterator[None]:
    """Inside, the adapter (or none, for `None`) is active in PEFT's layers; it stays so until another is needed.

    What trains does not change.

    Args:
        backbone: A `PeftModel`.
        adapter: Name of the adapter.
        key: Passes with equal keys may run concurrently; by default those with the same adapter.
    """
    with _TURNS_LOCK:
        turns = _TURNS.setdefault(backbone, _Turns())
    key = key or (adapter,)
    with turns.condition:
        turns.condition.wait_for(lambda: not turns.users or turns.key == key)
        if not turns.users:
            _switch(backbone, adapter, turns)
            turns.key = key
        turns.users += 1
    try:
        yield
    finally:
        with turns.condition:
            turns.users -= 1
            if not turns.users:
                with _what_trains(backbone) if adapter is None else nullcontext():
                    turns.disabled.close()
                turns.condition.notify_all()


def activate_in_peft(backbone: Any, adapters: Sequence[str]) -> None:
    """Makes adapters active as soon as no running pass needs another one. What trains does not change."""
    with _TURNS_LOCK:
        turns = _TURNS.setdefault(backbone, _Turns())
    with turns.condition:
        turns.condition.wait_for(lambda: not turns.users)
        if list(backbone.active_adapters) != list(adapters):
            with _what_trains(backbone):
                backbone.set_adapter(adapters[0])
                if len(adapters) > 1:
                    backbone.base_model.set_adapter(list(adapters))


def _switch(backbone: Any, adapter: str | None, turns: _Turns) -> None:
    if adapter is None:
        from pal_adapters.hosts.peft.tuner import adapters_off  # the host may be missing

        with _what_trains(backbone):
            turns.disabled.enter_context(adapters_off(backbone))
    elif list(backbone.active_adapters) != [adapter]:
        with _what_trains(backbone):
            backbone.set_adapter(adapter)


@contextmanager
def _what_trains(backbone: nn.Module) -> Iterator[None]:
    """Undoes PEFT's freezing of adapters it deactivates and unfreezing of others: what trains is the user's choice."""
    before = [(parameter, parameter.requires_grad) for parameter in backbone.parameters()]
    try:
        yield
    finally:
        for parameter, trains in before:
            if parameter.requires_grad is not trains:
                parameter.requires_grad_(trains)
