"""Calls and changes of a predictor's tasks."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pal_adapters.multitask.predict.gate import Gate


def test_an_interrupted_change_lets_later_calls_through(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, done = Gate(), []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with gate.call(), monkeypatch.context() as patched:
        patched.setattr(gate._condition, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt), gate.change():
            done.append("change")

    def call() -> None:
        with gate.call():
            done.append("call")
        with gate.change():
            done.append("change")

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert done == ["call", "change"]
