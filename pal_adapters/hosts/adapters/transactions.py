"""Makes the host's methods that change a model all-or-nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adapters.model_mixin import ModelAdaptersMixin

from pal_adapters.blocks.walk import named_modules
from pal_adapters.hosts.unchanged import all_or_nothing

from .layer import TaskLayer


@contextmanager
def changing(model: ModelAdaptersMixin) -> Iterator[None]:
    """A change of a model of `adapters`: if it raises, the model is put back to what it was.

    Units that are there change only in training modes, `requires_grad` and the values of their tensors.
    """
    modules = named_modules(model, units=False).values()
    layers = [module for module in modules if isinstance(module, TaskLayer)]
    owners = [owner for layer in layers for owner in (layer.attachment, layer.network)]
    with all_or_nothing(model, model.adapters_config, model.config, *owners, modules=modules):
        yield


def whole(original: Any) -> Any:
    """Make a method of a model all-or-nothing."""

    def wrapper(self: ModelAdaptersMixin, *args: Any, **kwargs: Any) -> Any:
        with changing(self):
            return original(self, *args, **kwargs)

    return wrapper
