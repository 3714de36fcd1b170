"""Stops a change at any point: an exception at the n-th function that is entered in a host, the package or torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_PLACES = ("/pal_adapters/", "/peft/", "/adapters/", "/torch/nn/modules/", "/safetensors/")
# Stopping the clean-up itself proves nothing.
_CLEAN_UP = ("/unchanged.py", "/contextlib.py")


class Stop(BaseException):
    """Like KeyboardInterrupt: no `Exception`."""


class _Counter:
    def __init__(self, at: int | None) -> None:
        self.at = at
        self.count = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not any(place in file for place in _PLACES):
            return
        # An exception in a generator that is being closed is dropped by Python.
        if frame.f_code.co_flags & 0x20 or _cleans_up(frame):
            return
        self.count += 1
        if self.count == self.at:
            sys.settrace(None)
            raise Stop


def _cleans_up(frame: FrameType | None) -> bool:
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name in ("__exit__", "restore") and file.endswith(_CLEAN_UP):
            return True
        frame = frame.f_back
    return False


def _traced(call: Callable[[], Any], at: int | None) -> int:
    counter, before = _Counter(at), sys.gettrace()
    sys.settrace(counter)
    try:
        call()
    finally:
        sys.settrace(before)
    return counter.count


def stopped(change: Callable[[Any], Any], model: Any, another: Any, points: int) -> Iterator[None]:
    """Changes a model, stopped at points spread over the change; yields after each, to look at what it left behind.

    Args:
        change: what changes a model.
        model: the model.
        another: one like it, on which the change is completed to count its steps.
        points: how many.
    """
    steps = _traced(lambda: change(another), None)
    for number in range(points):
        try:
            _traced(lambda: change(model), 1 + steps * (2 * number + 1) // (2 * points))
        except Stop:
            yield
        else:
            raise AssertionError("the change was completed")
