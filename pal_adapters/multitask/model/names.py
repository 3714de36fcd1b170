"""The rule for names that become part of a path: tasks, adapters and fusions."""

from __future__ import annotations

from torch import nn

from pal_adapters.errors import ConfigError

LONGEST = 100
"""In bytes. Keys of the log and names of files are made from a task's name, and file systems allow 255."""


def name_fault(name: object) -> str | None:
    """Why neither a folder nor a module can have this name; `None` if both can."""
    if not isinstance(name, str) or not name or {"/", "\\", "."} & set(name):
        return "use a name without '.', '/' and '\\'"
    if not name.isprintable() or name != name.strip() or len(name.encode(errors="replace")) > LONGEST:
        return (
            f"as no folder can have that name: use at most {LONGEST} printable characters, with no space at either end"
        )
    return None


def require_name(argument: str, name: object) -> None:
    """Raises `ConfigError` unless a folder can have this name."""
    if (fault := name_fault(name)) is not None:
        shown = repr(name)
        shown = shown if len(shown) < 60 else f"{shown[:60]}..."
        raise ConfigError(f"{argument}={shown} is not allowed{':' if fault.startswith('use') else ','} {fault}.")


def require_task_name(argument: str, name: object) -> None:
    """Raises `ConfigError` unless a task may have this name, which is also that of a module."""
    require_name(argument, name)
    if hasattr(nn.ModuleDict(), str(name)):
        raise ConfigError(
            f"{argument}={name!r} is not allowed: the heads are in an nn.ModuleDict, which has an attribute of that "
            f"name. Use another name, such as '{name}_task'."
        )
    if name == "average":
        raise ConfigError(
            f"{argument}={name!r} is not allowed: eval_{name} is the aggregate over all tasks. Use another name, such "
            f"as '{name}_task'."
        )
