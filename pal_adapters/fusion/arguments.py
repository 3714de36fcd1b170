"""Checks of the model and the fusion that a user passes."""

from __future__ import annotations

from typing import Any, Literal

from pal_adapters.errors import ConfigError, UnsupportedError
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


def require_fusion(host: Host, fusion: Any) -> None:
    """Raise `ConfigError` unless `fusion` is a name, a `Fuse` of `adapters`, or None."""
    if fusion is None or isinstance(fusion, str):
        return
    if host == "adapters":
        from adapters.composition import Fuse  # the host may be missing

        if isinstance(fusion, Fuse):
            return
    names = ", ".join(map(repr, fusion)) if isinstance(fusion, (list, tuple, set)) else "..."
    instead = (
        f"the block that was trained, Fuse({names}), or its name"
        if host == "adapters"
        else f"the name of the adapter that combines them, made with ScaLearnPeftConfig(adapters=[{names}]), or None "
        "for the active one"
    )
    raise ConfigError(f"fusion={fusion!r} is not allowed: pass {instead}.")
