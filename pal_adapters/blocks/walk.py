"""Walks over the modules of a model that stay cheap when it has many adapters."""

from __future__ import annotations

from torch import nn


def named_modules(model: nn.Module, skipped: type[nn.Module] | tuple[type[nn.Module], ...] = ()) -> dict[str, nn.Module]:
    """`dict(model.named_modules())` in one loop, where torch resumes one generator a level for each module.

    Args:
        model: the model.
        skipped: classes of modules to leave out with everything inside them; `model` itself is never left out.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        prefix = f"{name}." if name else ""
        for key in reversed(module._modules):
            child = module._modules[key]
            if child is not None and not isinstance(child, skipped):
                pending.append((prefix + key, child))
    return found
