"""Where a module computes, if accelerate keeps its weights elsewhere between calls (`device_map` with CPU or disk)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pal_adapters.errors import UnsupportedError

from .walk import named_modules


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks that accelerate attached to a module; it may not be installed, so they are known by their fields."""
    pending = [getattr(module, "_hf_hook", None)]
    while pending:
        hook = pending.pop()
        if hook is not None:
            yield hook
            pending += getattr(hook, "hooks", ())


def offloaded_to(module: nn.Module) -> torch.device | None:
    """The device to which the weights of a module, or of one inside it, are brought for each call, else None."""
    for part in named_modules(module, units=False).values():
        if "_hf_hook" not in vars(part):
            continue
        for hook in _hooks(part):
            if getattr(hook, "offload", False) and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return None


def require_at_hand(module: nn.Module, use: str) -> None:
    """Raise `UnsupportedError` if weights of a module are offloaded.

    Args:
        module: the module.
        use: what is done with the weights, after "which".
    """
    if offloaded_to(module) is not None:
        raise UnsupportedError(
            f"accelerate offloads weights of {type(module).__name__}, which {use}: load the model without 'cpu' and "
            "'disk' in its device_map."
        )


def computing_device(module: nn.Module, stored: torch.device) -> torch.device:
    """The device on which a module computes, given the one that its weights are on between calls.

    Weights on the meta device either have not been loaded yet, and stay there, or are offloaded.
    """
    return stored if stored.type != "meta" else offloaded_to(module) or stored
