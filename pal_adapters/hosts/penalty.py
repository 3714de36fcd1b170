"""Who adds the penalty on a fusion's coefficients to the loss: the model, or the one who calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_BY_CALLER = ContextVar("pal_adapters_penalty_by_caller", default=False)


@contextmanager
def penalty_by_caller() -> Iterator[None]:
    """Models called inside leave their penalty out, as the caller adds it to a loss of its own."""
    token = _BY_CALLER.set(True)
    try:
        yield
    finally:
        _BY_CALLER.reset(token)


def is_by_caller() -> bool:
    """Whether the penalty is left out now."""
    return _BY_CALLER.get()
