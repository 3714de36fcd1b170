"""The state of one call, kept by the thread that makes it.

Threads share a model, so nothing that belongs to one call may be stored on the model itself. Activation checkpointing
runs a block again in the backward pass, possibly in another thread: whatever was in force in the first run is bound
into the function that runs again, see `Rerun`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from pal_adapters.blocks.signatures import CHECKPOINTS_FORWARD
from pal_adapters.nn.tracing import tracing


class CallValue(threading.local):
    """A value of this thread's current call; None outside of calls. Copies start without one."""

    def __init__(self) -> None:
        # Once per thread. Were the value only an attribute of the class, the first call would add it to the object
        # and a compiled graph, which checks that, would be compiled again.
        self.value: Any = None

    @contextmanager
    def bound(self, value: Any) -> Iterator[None]:
        """Set the value inside the `with` block, and restore the previous one afterwards.

        An interrupt may leave a `with` block without its end, which then comes when the garbage is collected, maybe in
        the middle of another call: the value of that call stays.
        """
        before = self.value
        self.value = value
        try:
            yield
        finally:
            if self.value is value:
                self.value = before

    def run(self, value: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function with this value, and restore the previous one afterwards."""
        before = self.value
        self.value = value
        try:
            return function(*args, **kwargs)
        finally:
            self.value = before

    def __deepcopy__(self, memo: dict[int, Any]) -> CallValue:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class CallLock:
    """A re-entrant lock for the calls of one module. Copies start unlocked."""

    def __init__(self) -> None:
        # To be taken by a `with` statement around the call itself. An exception of another thread or of a signal
        # handler, such as KeyboardInterrupt, may arrive between any two calls of Python functions. It then leaves a
        # context manager written in Python without its end, and a lock held in there would never be released.
        self.lock = threading.RLock()

    def mine(self) -> bool:
        """Whether this thread holds the lock."""
        # `RLock` has no public way to ask; `threading.Condition` asks in this way too.
        return self.lock._is_owned()  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> CallLock:
        return CallLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return CallLock, ()


# Where a module keeps the function that runs parts of it again: modules of transformers, and the wrapper
# `CheckpointWrapper` of torch, which FSDP puts around blocks.
_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


def checkpoints(module: nn.Module) -> bool:
    """Whether a module has parts run again in the backward pass."""
    return bool(getattr(module, "gradient_checkpointing", False)) or "checkpoint_fn" in module.__dict__


def runs_again() -> bool:
    """Whether this thread is in a backward pass, where activation checkpointing runs modules again."""
    return not tracing() and torch._C._current_graph_task_id() != -1


# The wrappers of the `forward` of the block that is about to be checkpointed, the outermost first.
_AROUND = CallValue()
Around = Callable[..., Any]


class Kept(Protocol):
    """What a module that runs again gets back, such as a `CallValue`."""

    @property
    def value(self) -> Any:
        """What is in force now."""

    def run(self, value: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function with this in force."""


class Rerun:
    """A checkpoint function that runs its function, every time, with the call values of the first run.

    Args:
        function: the host's checkpoint function.
        values: the call values to restore.
    """

    def __init__(self, function: Callable[..., Any], values: tuple[Kept, ...]) -> None:
        self.function = function
        self.values = values

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        around, _AROUND.value = _AROUND.value or (), None
        given = tuple((value, value.value) for value in self.values)
        return self.function(functools.partial(_again, given, around, run), *args, **kwargs)


def _again(
    given: tuple[tuple[Kept, Any], ...],
    around: tuple[Around, ...],
    run: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if around and isinstance(run, functools.partial):  # the host's partial: the wrappers need its keywords too
        kwargs = {**run.keywords, **kwargs}
        run = functools.partial(run.func, *run.args)
    for one in reversed(around):
        run = functools.partial(one, run)
    for value, held in reversed(given):
        run = functools.partial(value.run, held, run)
    return run(*args, **kwargs)


def bind_reruns(modules: Iterable[nn.Module], *values: Kept) -> None:
    """Give these values to whatever the modules re-run in the backward pass."""
    for module in modules:
        for name in _FUNCTIONS:
            function: Any = module.__dict__.get(name)
            if function is None:
                continue
            if not isinstance(function, Rerun):
                setattr(module, name, Rerun(function, values))
            elif missing := tuple(value for value in values if not any(value is known for known in function.values)):
                function.values = (*function.values, *missing)


def run_around(block: Any, around: Around, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `around(forward, ...)` so that activation checkpointing re-runs all of it, not just `forward`.

    Args:
        block: the block.
        around: the wrapper, called with the function it wraps and the arguments.
        forward: the block's own `forward`.
    """
    checkpointed = block.__dict__.get("_gradient_checkpointing_func") is not None and CHECKPOINTS_FORWARD
    if not (checkpointed and block.gradient_checkpointing and block.training and torch.is_grad_enabled()):
        return around(forward, *args, **kwargs)
    bind_reruns([block])
    return _AROUND.run((*(_AROUND.value or ()), around), forward, *args, **kwargs)
