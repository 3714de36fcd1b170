"""Which host a model belongs to. Every part of the package asks here."""

from __future__ import annotations

import sys
from typing import Any, Literal


def host_of(model: Any) -> Literal["adapters", "peft"] | None:
    """The library that adapted a model, or None for a model without adapters.

    A `PeftModel` and a model that got its adapter from transformers' own `add_adapter` both belong to PEFT;
    `is_peft_model` tells them apart.
    """
    if is_peft_model(model):
        return "peft"
    if hasattr(model, "adapters_config"):
        return "adapters"
    return "peft" if hasattr(model, "peft_config") else None


def is_peft_model(model: Any) -> bool:
    """Whether a model is a `PeftModel`, which wraps the base model; needs no import of PEFT."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)
