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
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.call import CallValue, bind_reruns

T = TypeVar("T")
Under = Callable[[Callable[[], Any]], Any]
"""Runs a function under a setup. It is no context manager, which an interrupt may leave without its end."""


class _Pass(CallValue):
    """The setup of the pass that this thread is in. A recomputed block runs under it again."""

    def run(self, value: Under | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = partial(function, *args, **kwargs)
        return super().run(value, call if value is None else partial(value, call))


class _Context:
    """The `ForwardContext` of `adapters`. Its own checkpointing restores it; wrappers of torch do not."""

    @property
    def value(self) -> Any:
        context = sys.modules.get("adapters.context")
        return None if context is None else context.ForwardContext.get_context()

    def run(self, value: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if value is None else value:
            return function(*args, **kwargs)


_PASS = _Pass()
_CONTEXT = _Context()


def in_pass(backbone: nn.Module, under: Under, run: Callable[[], T]) -> T:
    """Runs one pass through the backbone under a setup, which blocks recomputed later get again."""
    if backbone.training:
        bind_reruns(backbone.modules(), _PASS, _CONTEXT)
    return _PASS.run(under, run)


def under_setup(setup: Any) -> Under:
    """Under a composition of `adapters`, or the base model alone for `None`."""
    from adapters.context import AdapterSetup  # only here: other hosts do without `adapters`

    context = AdapterSetup(setup)  # the same for all blocks, also for those that run again

    def under(run: Callable[[], Any]) -> Any:
        with context:
            return run()

    return under


class _Turn:
    """A pass with a model whose host keeps the active adapter in its layers. It lasts as long as its lock is held.

    Args:
        key: Passes with equal keys may run concurrently.
    """

    def __init__(self, key: object) -> None:
        self.key = key
        self.lock = threading.Lock()
        self.thread = threading.get_ident()


class _Turns:
    """The passes that use such a model."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running: list[_Turn] = []
        self.disabled: ExitStack | None = None
        # Whether an interrupt may have left some layers with one adapter and some with another.
        self.switching = False

    def others(self, key: object) -> list[_Turn]:
        """The running passes with another key."""
        self.running = [turn for turn in self.running if turn.lock.locked()]
        return [turn for turn in self.running if turn.key != key]

    def enable(self, backbone: nn.Module) -> None:
        """Undoes the disabling of all adapters for a pass that has ended."""
        if self.disabled is not None:
            with _what_trains(backbone):
                self.disabled.close()
            self.disabled = None


_TURNS: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def active_in_peft(backbone: Any, adapter: str | None, run: Callable[[], T], *, key: object = None) -> T:
    """Runs a function while an adapter (or none, for `None`) is active in PEFT's layers; it stays so until another is.

    What trains does not change.

    Args:
        backbone: A `PeftModel`.
        adapter: Name of the adapter.
        run: The function.
        key: Passes with equal keys may run concurrently; by default those with the same adapter.

    Raises:
        UnsupportedError: Inside a pass of this thread under another adapter.
    """
    turns = _turns(backbone)
    turn = _Turn(key or (adapter,))
    with turn.lock:
        _wait(turns, turn, lambda: _switch(backbone, adapter, turns))
        try:
            return run()
        finally:
            with turns.lock:
                turns.running.remove(turn)
                if adapter is None and not turns.running:
                    turns.enable(backbone)


def activate_in_peft(backbone: Any, adapters: Sequence[str]) -> None:
    """Makes adapters active as soon as no running pass needs another one. What trains does not change."""
    turns = _turns(backbone)

    def switch() -> None:
        if list(backbone.active_adapters) != list(adapters):
            with _what_trains(backbone):
                backbone.set_adapter(adapters[0])
                if len(adapters) > 1:
                    backbone.base_model.set_adapter(list(adapters))

    turn = _Turn(object())
    with turn.lock:
        _wait(turns, turn, switch)


def _turns(backbone: nn.Module) -> _Turns:
    with _TURNS_LOCK:
        return _TURNS.setdefault(backbone, _Turns())


def _wait(turns: _Turns, turn: _Turn, switch: Callable[[], None]) -> None:
    """Waits until no pass with another key runs, then switches and lets the pass run."""
    while True:
        with turns.lock:
            others = turns.others(turn.key)
            if not others:
                if not turns.running:
                    switch()
                turns.running.append(turn)
                return
        if others[0].thread == turn.thread:
            raise UnsupportedError(
                "the model was called from within itself for a task with another adapter, and PEFT keeps the active "
                "adapter in the model: call it before or after, or use a method of pal_adapters."
            )
        with others[0].lock:  # until it has ended
            pass


def _switch(backbone: Any, adapter: str | None, turns: _Turns) -> None:
    turns.enable(backbone)
    if adapter is None:
        from pal_adapters.hosts.peft.tuner import adapters_off  # the host may be missing

        turns.disabled = ExitStack()
        with _what_trains(backbone):
            turns.disabled.enter_context(adapters_off(backbone))
    elif turns.switching or list(backbone.active_adapters) != [adapter]:
        turns.switching = True
        with _what_trains(backbone):
            backbone.set_adapter(adapter)
        turns.switching = False


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
