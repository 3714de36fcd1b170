"""Statistics of a model's hidden values over a data set."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pal_adapters.errors import ConfigError

from .truncation import moments

Key = TypeVar("Key", bound=Hashable)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def batches_of(data: Iterable[Any]) -> Iterator[tuple[Mapping[str, Any], Tensor | None]]:
    """Batches and their token masks `[b, n]`.

    Raises:
        ConfigError: if there are no batches, or a batch is not a mapping of model inputs.
    """
    empty = True
    for batch in data:
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"data contains an object of type {type(batch).__name__}: pass mappings of model inputs."
            )
        empty = False
        mask = batch.get("attention_mask")
        yield batch, mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if empty:
        raise ConfigError("data is empty: pass at least one batch of model inputs.")


def moments_of_data(
    model: nn.Module, hidden: Mapping[Key, tuple[nn.Module, Callable[[Any], Tensor]]], data: Iterable[Any]
) -> dict[Key, Tensor]:
    """The moments of hidden values over all tokens that are not padding, see `truncation.moments`.

    Args:
        model: the model to run.
        hidden: for each place a module, and a function that maps the module's arguments to the hidden values
            `[b, n, r]`.
        data: batches, mappings of model inputs.
    """
    sums: dict[Key, Tensor] = {}
    mask: Tensor | None = None

    def hook_of(key: Key, read: Callable[[Any], Tensor]) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            values = read(args)
            kept = values[mask] if mask is not None and mask.shape == values.shape[:2] else values.flatten(0, -2)
            sums[key] = sums.get(key, 0) + moments(kept)

        return hook

    handles = [module.register_forward_pre_hook(hook_of(key, read)) for key, (module, read) in hidden.items()]
    try:
        with evaluating(model):
            for batch, mask in batches_of(data):  # noqa: B007  (the hooks read it)
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return sums
