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
Kept = Callable[[Tensor], Tensor]
"""The vectors of tokens that are not padding, see `record_calls`."""


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


def record_calls(
    model: nn.Module,
    modules: Mapping[Key, nn.Module],
    record: Callable[[Key, Any, Any, Kept], None],
    data: Iterable[Any],
) -> None:
    """Run a model on batches, and call `record(key, args, output, kept)` after each call of one of its modules.

    `kept` takes values `[b, n, ...]` and returns those of the tokens that are not padding, `[t, ...]`; values whose
    tokens are already flattened count as tokens without padding.

    Args:
        model: the model to run.
        modules: the modules by key.
        record: reads a call.
        data: batches, mappings of model inputs.
    """
    mask: Tensor | None = None

    def kept(values: Tensor) -> Tensor:
        return values[mask] if mask is not None and mask.shape == values.shape[:2] else values.flatten(0, -2)

    def hook_of(key: Key) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: record(key, args, output, kept)

    handles = [module.register_forward_hook(hook_of(key)) for key, module in modules.items()]
    try:
        with evaluating(model):
            for batch, mask in batches_of(data):  # noqa: B007  (`kept` reads it)
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()


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

    def record(key: Key, args: Any, output: Any, kept: Kept) -> None:
        sums[key] = sums.get(key, 0) + moments(kept(hidden[key][1](args)))

    record_calls(model, {key: module for key, (module, _) in hidden.items()}, record, data)
    return sums
