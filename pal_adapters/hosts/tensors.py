"""Whether a tensor from a file can replace one of a model, for every entry point of both hosts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fault_of(name: str, new: Any, old: Tensor) -> str | None:
    """Why `new`, from a file, cannot replace `old`, as a clause without a full stop; None if it can."""
    if not isinstance(new, Tensor):
        return f"{name} is a {type(new).__name__} in the file, not a tensor"
    if new.shape != old.shape:
        return f"{name} has shape {list(new.shape)} in the file and {list(old.shape)} on the model"
    if new.dtype != old.dtype and not (new.is_floating_point() and old.is_floating_point()):
        return f"{name} has dtype {new.dtype} in the file and {old.dtype} on the model"
    if not new.is_meta and not torch.isfinite(new.to(old.dtype)).all():
        return (
            f"{name} has values that are not finite in {old.dtype}: its training has diverged, or the file is damaged"
        )
    return None
