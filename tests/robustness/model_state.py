"""Everything about a model that a rejected call must leave as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def state(model: nn.Module) -> dict[str, Any]:
    """Modules and modes, hooks, tensors with their values and `requires_grad`, and the host's records."""
    known = getattr(model, "adapters_config", None)
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "hooks": [[list(getattr(m, hooks)) for hooks in HOOKS] for m in model.modules()],
        "forwards": [name for name, m in model.named_modules() if "forward" in m.__dict__],
        "tensors": {name: (id(t), t.requires_grad, t.detach().clone()) for name, t in _tensors(model).items()},
        "adapters": None if known is None else copy.deepcopy(known.to_dict()),
        "active": None if known is None else (repr(known.active_setup), known.skip_layers),
        "heads": sorted(getattr(model, "heads", ())),
        "config": copy.deepcopy(getattr(model.config, "prediction_heads", None)),
        "tied": copy.copy(getattr(model, "_tied_weights_keys", None)),
    }


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two states; empty if nothing does."""
    found = [key for key in before if key != "tensors" and before[key] != after[key]]
    old, new = before["tensors"], after["tensors"]
    found += [f"tensor {name}" for name in old.keys() ^ new.keys()]
    for name in old.keys() & new.keys():
        same = old[name][:2] == new[name][:2] and torch.equal(old[name][2], new[name][2])
        found += [] if same else [f"tensor {name}"]
    return found
