"""Names that a task may have."""

from __future__ import annotations

from torch import nn

from pal_adapters.errors import ConfigError


def require_task_name(argument: str, name: object) -> None:
    """Raises `ConfigError` unless a task may have this name, under which its head is a module."""
    if not isinstance(name, str) or not name or {"/", "."} & set(name):
        raise ConfigError(f"{argument}={name!r} is not allowed: use a name without '.' and '/'.")
    if hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"{argument}={name!r} is not allowed: nn.ModuleDict, which holds the heads, has an attribute of that "
            f"name. Use another, such as '{name}_task'."
        )
    if name == "average":
        raise ConfigError(
            f"{argument}={name!r} is not allowed: eval_{name} is the aggregate of all tasks. Use another, such as "
            f"'{name}_task'."
        )
