"""KeyboardInterrupt and other exceptions that arrive anywhere in a call: calls after it are right, in all threads.

They arrive between bytecodes, so neither `with` nor `finally` is sure to run if it is written in Python. A debugger or
a notebook keeps the traceback, and with it the frames: what a generator would do at its end, it does much later.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import pal_adapters
from pal_adapters.multitask.model.visiting import visiting

from .test_threads_task_heads import model_of
from .threads import ids_of

Key = tuple[CodeType, CodeType | None, str]
Call = Callable[[], Tensor]


class Interrupt(BaseException):
    """As KeyboardInterrupt, no `Exception`."""


def points(call: Call, at: Key | None = None) -> list[Key]:
    """The starts and ends of functions of this package and of its context managers, by caller; raises `at` one."""
    seen: dict[Key, None] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code, name = frame.f_code, frame.f_code.co_filename
        if event not in ("call", "return") or not ("pal_adapters" in name or name.endswith("contextlib.py")):
            return
        if code.co_flags & inspect.CO_GENERATOR:  # an exception is ignored where one that is not used up ends
            return
        key = code, None if frame.f_back is None else frame.f_back.f_code, event
        seen[key] = None
        if key == at:
            sys.setprofile(None)
            raise Interrupt

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(seen)


def in_a_thread(run: Callable[[], Any]) -> None:
    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join(60)
    assert not worker.is_alive(), "a lock was not released"


CASES = [(host, method) for host, method in (
    ("peft", "pal"), ("peft", "lora"), ("peft", "ca_mtl"), ("adapters", "pal"), ("adapters", "ca_mtl"),
) if {"peft": "PALPeftConfig", "adapters": "PALConfig"}[host] in pal_adapters.__all__]  # fmt: skip


@pytest.mark.parametrize(("host", "method"), CASES)
def test_task_heads(host: str, method: str) -> None:
    model = model_of(host, method)
    parameters = [id(parameter) for parameter in model.parameters()]

    def call(task: str) -> Tensor:
        with torch.no_grad():
            return model(task_ids=task, input_ids=ids_of(1)).logits[task]

    tasks = ("fr", "none", "de")
    expected = {task: call(task) for task in tasks}
    kept: list[BaseException] = []
    wrong: list[Any] = []

    def compare() -> None:
        for task in tasks:
            try:
                same = torch.allclose(call(task), expected[task], atol=1e-5)
            except Exception as error:
                wrong.append(error)
            else:
                wrong.extend([] if same else [task])

    found = points(lambda: call("de"))
    assert len(found) > 30
    for key in found:

        def run(key: Key = key) -> None:
            try:
                points(lambda: call("de"), key)
            except Interrupt as error:
                kept.append(error)
            compare()

        before = len(kept)
        in_a_thread(run)  # the thread that was interrupted
        in_a_thread(compare)  # and another one
        assert len(kept) == before + 1, f"not reached: {key}"
        assert not wrong, f"{key}: {wrong}"
        assert [id(parameter) for parameter in model.parameters()] == parameters


@pytest.mark.skipif("PALPeftConfig" not in pal_adapters.__all__, reason="needs peft")
@pytest.mark.parametrize("names", [None, ["fr", "de", "it", "fr"]])
def test_adapter_names(names: list[str] | None) -> None:
    """The next call does not inherit the names of a call without its end, nor does it lose its own to it."""
    model = model_of("peft", "pal").backbone
    model.set_adapter("it")

    def call(names: list[str] | None) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids_of(1), **({} if names is None else {"adapter_names": names})).last_hidden_state

    given = [None, ["de"] * 4, ["fr", "de", "it", "fr"]]
    expected = [call(one) for one in given]
    for key in points(lambda: call(names)):
        kept: list[BaseException] = []
        wrong: list[Any] = []

        def run(key: Key = key, kept: list[BaseException] = kept, wrong: list[Any] = wrong) -> None:
            try:
                points(lambda: call(names), key)
            except Interrupt as error:
                kept.append(error)
            for turn in range(2):
                found = [call(one) for one in given]
                wrong.extend(
                    (turn, one) for one, a, b in zip(given, found, expected, strict=True) if not torch.equal(a, b)
                )
                # In the middle of a call, the frames of the interrupted one go away.
                model.get_base_model().embeddings.register_forward_hook(lambda *_: kept.clear())

        in_a_thread(run)
        model.get_base_model().embeddings._forward_hooks.clear()
        assert not wrong, f"{key}: {wrong}"


@pytest.mark.parametrize(("host", "method"), CASES)
def test_predictions(host: str, method: str) -> None:
    """A model in training mode is in it again after the next call, whatever the interrupted one left behind."""
    model = model_of(host, method).train()
    modes = {name: module.training for name, module in model.named_modules()}

    def visit() -> Tensor:
        with visiting(model, model.backbone):
            assert not any(module.training for module in model.modules())
            return torch.zeros(())

    found = points(visit)
    assert len(found) > 4
    for key in found:

        def interrupted(key: Key = key) -> None:
            with pytest.raises(Interrupt):
                points(visit, key)

        in_a_thread(interrupted)
        in_a_thread(visit)
        assert {name: module.training for name, module in model.named_modules()} == modes, key
