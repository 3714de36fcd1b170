"""Calls of one model from many threads at once, compared with the same calls made one after the other."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

THREADS = 8
# Calls a thread in each test; the environment variable asks for more.
CALLS = int(os.environ.get("PAL_ADAPTERS_THREAD_CALLS", "4"))


@contextmanager
def eager_switching() -> Iterator[None]:
    """Threads take turns far more often than by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def ids_of(number: int, rows: int = 4) -> Tensor:
    """Another length for each number."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, 40, (rows, 4 + number % 5), generator=generator)


def mask_of(ids: Tensor, *, left: bool = False) -> Tensor:
    mask = torch.ones_like(ids)
    mask[1, slice(0, 2) if left else slice(-2, None)] = 0
    return mask


def loss_of(states: Tensor) -> Tensor:
    """A loss of hidden states. Behind a layer norm, the sum of their squares would hardly depend on anything."""
    direction = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(3)).to(states.dtype)
    return (states @ direction).tanh().mean()


def check(call: Callable[[int], Any], *, variants: int = 5, calls: int = CALLS, threads: int = THREADS) -> None:
    """`call(number)` gives a tensor, or several, that depends on the number alone, whatever other threads do."""
    expected = [_tensors(call(number)) for number in range(variants)]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(expected[0], expected[1], strict=True)), (
        "calls with other numbers have to differ"
    )
    wrong: list[str] = []
    start = threading.Barrier(threads)

    def work(thread: int) -> None:
        start.wait()
        for turn in range(calls):
            number = (thread + turn) % variants
            try:
                found = _tensors(call(number))
            except Exception as error:  # whatever it is, it goes to the list that the test looks at
                wrong.append(f"{type(error).__name__}: {error}")
                continue
            if not all(_close(a, b) for a, b in zip(found, expected[number], strict=True)):
                wrong.append("other values")

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    with eager_switching():
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong, f"{len(wrong)} of {threads * calls} calls: {sorted(set(wrong))[:3]}"


@contextmanager
def beside(change: Callable[[], Any]) -> Iterator[None]:
    """Calls `change` again and again in another thread while the body runs; nothing may go wrong in it."""
    failed: list[Exception] = []
    ended = threading.Event()

    def work() -> None:
        try:
            while not ended.is_set():
                change()
        except Exception as error:  # whatever it is, the test looks at it
            failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        ended.set()
        worker.join()
    assert not failed


def _tensors(value: Any) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) if not a.is_floating_point() else bool((a - b).abs().max() <= 1e-5)


def randomise(model: nn.Module) -> None:
    """Weights that make every part matter, in what the adapters train."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
