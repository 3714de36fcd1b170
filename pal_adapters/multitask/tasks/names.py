"""Names that a task may have."""

from __future__ import annotations

from torch import nn

from pal_adapters.errors import ConfigError

_LONGEST = 100


def require_task_name(argument: str, name: object) -> None:
    """Raise `ConfigError` unless a task may have this name, which is also that of a module and of a folder."""
    if not isinstance(name, str) or not name or {"/", "\\", "."} & set(name):
        raise ConfigError(f"{argument}={name!r} is not allowed: use a name without '.', '/' and '\\'.")
    if not name.isprintable() or name != name.strip() or len(name.encode()) > _LONGEST:
        raise ConfigError(
            f"{argument}={name!r:.60} is not allowed, as no folder can have that name: use at most {_LONGEST} "
            "printable characters, with no space at either end."
        )
    if hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"{argument}={name!r} is not allowed: the heads are in an nn.ModuleDict, which has an attribute of that "
            f"name. Use another name, such as '{name}_task'."
        )
    if name == "average":
        raise ConfigError(
            f"{argument}={name!r} is not allowed: eval_{name} is the aggregate over all tasks. Use another name, such "
            f"as '{name}_task'."
        )
