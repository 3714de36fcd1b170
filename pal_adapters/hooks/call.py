"""The state of one call, kept by the thread that makes it.

Threads share a model, so nothing that belongs to one call may be stored on the model itself. Activation checkpointing
runs a block again in the backward pass, possibly in another thread: whatever was in force in the first run is bound
into the function that runs again, see `Rerun`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
        """Set the value inside the `with` block, and restore the previous one afterwards."""
        before = self.value
        self.value = value
        try:
            yield
        finally:
            self.value = before

    def __deepcopy__(self, memo: dict[int, Any]) -> CallValue:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class CallLock:
    """A re-entrant lock. Copies start unlocked."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock. A compiled graph reads the parameters directly and swaps nothing, so it needs none."""
        if tracing():
            yield
            return
        with self._lock:
            yield

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

    def bound(self, value: Any) -> AbstractContextManager[Any]:
        """Bring it in force."""


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
    with ExitStack() as stack:
        for value, held in given:
            stack.enter_context(value.bound(held))
        if around and isinstance(run, functools.partial):  # the host's partial: the wrappers need its keywords too
            kwargs = {**run.keywords, **kwargs}
            run = functools.partial(run.func, *run.args)
        for one in reversed(around):
            run = functools.partial(one, run)
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
    with _AROUND.bound((*(_AROUND.value or ()), around)):
        return forward(*args, **kwargs)
