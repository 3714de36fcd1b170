"""Calls that put a model in the right state for predictions, and leave it as they found it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from .routes import adapter_host
from .setups import activate_in_peft


class _Visit:
    """One call."""


class _Visits:
    """The calls that currently use a model, and what to restore after the last of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # Weak: a call that is interrupted on its way out must not keep the model in evaluation mode for ever.
        self.inside: WeakSet[_Visit] = WeakSet()
        self.training: dict[nn.Module, None] = {}
        self.active: list[str] = []


_VISITS: WeakKeyDictionary[nn.Module, _Visits] = WeakKeyDictionary()
_VISITS_LOCK = threading.Lock()


@contextmanager
def visiting(model: nn.Module, backbone: Any) -> Iterator[None]:
    """Inside, the model is in evaluation mode and computes no gradients. Any number of threads may be inside.

    Whether gradients are computed belongs to the thread. The training mode is an attribute of the modules, so a model
    in training mode is in evaluation mode for all threads while anyone is inside; the last one to leave puts it back,
    and the active adapter of PEFT with it. A model in evaluation mode is not touched.

    Args:
        model: The model with its heads.
        backbone: The model of the host.
    """
    with _VISITS_LOCK:
        visits = _VISITS.setdefault(model, _Visits())
    visit = _Visit()
    try:
        with visits.lock:
            if not visits.inside and adapter_host(backbone) == "peft":
                visits.active = list(backbone.active_adapters)
            visits.inside.add(visit)
            for module in model.modules():
                if module.training:
                    visits.training[module] = None
                    module.training = False
        with torch.no_grad():
            yield
    finally:
        with visits.lock:
            visits.inside.discard(visit)
            if not visits.inside:
                for module in visits.training:
                    module.training = True
                visits.training.clear()
                if visits.active:
                    activate_in_peft(backbone, visits.active)
                    visits.active = []
