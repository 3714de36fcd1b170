"""Adds a penalty to the loss that a model returns in training, so that scaling and accumulation treat it as that loss.

A caller that computes its own loss adds the penalty there, see `penalty_by_caller`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .call import CallValue

_ITEMS = "num_items_in_batch"
_BY_CALLER = CallValue()
T = TypeVar("T")


def penalty_by_caller(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls a function in which models leave out their penalty, as the caller adds it to its own loss."""
    return _BY_CALLER.run(True, function, *args, **kwargs)


def is_by_caller() -> bool:
    """Whether the penalty is left out now."""
    return _BY_CALLER.value is True


def watch(model: nn.Module, hook: Callable[..., Any]) -> None:
    """Register a forward hook that adds a penalty to a model's output with `add_to_loss`."""
    if not any(known is hook for known in model._forward_hooks.values()):
        model.register_forward_pre_hook(follow_items, with_kwargs=True)
        model.register_forward_hook(hook, with_kwargs=True)


def unwatch(model: nn.Module, hook: Callable[..., Any]) -> None:
    """Undo `watch`."""
    for hooks, flags, ours in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, follow_items),
        (model._forward_hooks, model._forward_hooks_with_kwargs, hook),
    ):
        for key in [key for key, known in hooks.items() if known is ours]:
            hooks.pop(key)
            flags.pop(key, None)


def follow_items(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: lets autograd tell whether the loss was divided by the number of items, see `_share`."""
    items = kwargs.get(_ITEMS)
    if items is None or not torch.is_grad_enabled():
        return None
    return args, {**kwargs, _ITEMS: torch.as_tensor(items).detach().float().requires_grad_()}


def add_to_loss(output: Any, kwargs: Mapping[str, Any], penalty: Tensor) -> Any:
    """A model's output with the penalty in its loss; None, with a warning, if it returned no loss.

    Args:
        output: a mapping with `loss`, or a tuple that begins with it if the model got labels.
        kwargs: the model's arguments.
        penalty: a scalar.
    """
    labels = kwargs.get("labels")
    if isinstance(output, tuple):
        if labels is not None:
            return (_sum(output[0], penalty, labels, kwargs), *output[1:])
    elif isinstance(output, MutableMapping) and output.get("loss") is not None:
        output["loss"] = _sum(output["loss"], penalty, labels, kwargs)
        return output
    warnings.warn(
        "the model returned no loss, so the fusion's regularization is not part of it: pass labels, or add "
        "pal_adapters.fusion_regularization(model) to your own loss.",
        stacklevel=2,
    )
    return None


def _sum(loss: Tensor, penalty: Tensor, labels: Any, kwargs: Mapping[str, Any]) -> Tensor:
    return loss + penalty.to(loss.device) * _share(loss, labels, kwargs.get(_ITEMS))


def _share(loss: Tensor, labels: Any, items: Any) -> Tensor | float:
    """The share of the penalty that belongs to this batch.

    `Trainer` gives the number of labels in all batches of a step to the model. A model that divides by it returns
    its batch's share of one loss: the penalty is shared in the same way. A model that ignores it returns a mean.
    """
    if not isinstance(items, Tensor) or not items.requires_grad or not isinstance(labels, Tensor):
        return 1.0
    (used,) = torch.autograd.grad(loss.sum(), items, retain_graph=True, allow_unused=True)
    return 1.0 if used is None else (labels != -100).sum().to(items.device) / items.detach()
