"""Lets any number of calls run at once, or a single change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Calls run concurrently. A change waits for the running calls; later calls wait for the change."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running = 0
        self._changes = 0
        self._changing = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call."""
        with self._condition:
            self._condition.wait_for(lambda: not self._changes)
            self._running += 1
        try:
            yield
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """One change; changes run one after the other."""
        entered = False
        with self._condition:
            self._changes += 1
        try:
            with self._condition:
                self._condition.wait_for(lambda: not self._running and not self._changing)
                entered = self._changing = True
            yield
        finally:  # also when interrupted while waiting, since calls would wait for this change forever
            with self._condition:
                self._changes -= 1
                self._changing = self._changing and not entered
                self._condition.notify_all()
