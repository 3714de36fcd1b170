"""Walks over a model that stay cheap when it has many adapters: one loop, where torch resumes a generator a level."""

from __future__ import annotations

from torch import nn

from pal_adapters.nn.unit import TaskUnit, UnitDict


def named_modules(model: nn.Module, *, units: bool = True, once: bool = True) -> dict[str, nn.Module]:
    """`dict(model.named_modules())`.

    Args:
        model: the model.
        units: whether to enter task units; `model` itself may be one in any case.
        once: whether a module with several names appears under the first only.
    """
    skipped = () if units else (TaskUnit, UnitDict)
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        name, module = pending.pop()
        if once and id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        prefix = f"{name}." if name else ""
        for key, child in reversed([*module._modules.items()]):  # copied: another thread may add an adapter
            if child is not None and not isinstance(child, skipped):
                pending.append((prefix + key, child))
    return found


def parameters(model: nn.Module, *, units: bool = True) -> list[nn.Parameter]:
    """`list(model.parameters())`, in the same order; `units` as in `named_modules`."""
    found: dict[int, nn.Parameter] = {}
    for module in named_modules(model, units=units).values():
        for parameter in [*module._parameters.values()]:
            if parameter is not None:
                found.setdefault(id(parameter), parameter)
    return list(found.values())
