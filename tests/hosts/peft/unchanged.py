"""What a model is, taken apart without the package's own snapshot, to show that a rejected call changed nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def picture(model: nn.Module, *configs: Any) -> dict[str, Any]:
    """Everything about a model that a call may change."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name}: module"] = id(module)
        found[f"{name}: hooks"] = [[(k, id(hook)) for k, hook in getattr(module, kind).items()] for kind in HOOKS]
        found[f"{name}: forward"] = id(vars(module).get("forward"))
        for key, value in vars(module).items():
            if _plain(value):
                found[f"{name}.{key}"] = value
            elif isinstance(value, (list, tuple, set)) and all(_plain(item) for item in value):
                found[f"{name}.{key}"] = type(value)(value)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"{name}: parameter"] = (id(parameter), parameter.requires_grad, parameter.dtype, parameter.device)
    for name, value in model.state_dict().items():
        found[f"{name}: value"] = value.clone()
    for name, config in getattr(model, "peft_config", {}).items():
        found[f"peft_config {name}"] = (id(config), copy.deepcopy(vars(config)))
    for number, config in enumerate(configs):
        found[f"config {number}"] = copy.deepcopy(vars(config))
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two snapshots."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor):
            return isinstance(other, torch.Tensor) and torch.equal(one, other)
        return bool(one == other)

    return [
        key
        for key in {**before, **after}
        if key not in before or key not in after or not same(before[key], after[key])
    ]


@contextlib.contextmanager
def rejected(
    model: nn.Module, *configs: Any, run: Callable[[], torch.Tensor] | None = None, **expected: Any
) -> Iterator[None]:
    """The body raises, and neither the model nor the configs have changed; `expected` goes to `pytest.raises`."""
    output = None if run is None else run()
    before = picture(model, *configs)
    with pytest.raises(expected.pop("error", Exception), **expected):
        yield
    assert differences(before, picture(model, *configs)) == []
    if run is not None:
        assert torch.equal(run(), output)
