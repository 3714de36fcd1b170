"""Checks of the model that a user passes."""

from __future__ import annotations

from typing import Any, Literal

from pal_adapters.errors import UnsupportedError
from pal_adapters.hosts.which import host_of

Host = Literal["adapters", "peft"]


def require_host(model: Any) -> Host:
    """The host of a model; `UnsupportedError` if it has none."""
    host = host_of(model)
    if host is None:
        raise UnsupportedError(
            f"{type(model).__name__} has no adapters: pass a model after adapters.init(model) or get_peft_model(...)."
        )
    return host
