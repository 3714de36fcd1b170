"""The rule for names that become part of a path: tasks, adapters and fusions."""

from __future__ import annotations

from pal_adapters.errors import ConfigError

LONGEST = 100
"""In bytes. Keys of the log and names of files are made from a task's name, and file systems allow 255."""


def name_fault(name: object) -> str | None:
    """Why no folder, and no module, can have this name; `None` if one can."""
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
