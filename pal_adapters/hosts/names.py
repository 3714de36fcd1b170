"""The names that adapters and fusions may have, in both hosts."""

from __future__ import annotations

from torch import nn

from pal_adapters.errors import ConfigError

_SEPARATORS = {".": "module paths", "/": "file paths", "\\": "file paths", ",": "fusions"}
_RESERVED = ("__base__",)
_TAKEN = frozenset(dir(nn.ModuleDict()))


def require_adapter_name(argument: str, name: object) -> None:
    """Raise `ConfigError` unless an adapter may have this name.

    Names become modules, folders and parts of fusion names.

    Args:
        argument: the name of the argument.
        name: the name.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{argument}={name!r} is not allowed: use a non-empty string.")
    for character, where in _SEPARATORS.items():
        if character in name:
            raise ConfigError(f"{argument}={name!r} is not allowed: {character!r} is a separator in {where}.")
    if name != name.strip() or not name.isprintable():
        raise ConfigError(
            f"{argument}={name!r} is not allowed: use printable characters, without leading or trailing spaces."
        )
    if name in _RESERVED:
        raise ConfigError(f"{argument}={name!r} is not allowed: the name is reserved for the base model.")
    if name in _TAKEN:
        raise ConfigError(
            f"{argument}={name!r} is not allowed: torch.nn.ModuleDict, which holds adapters by name, has an attribute "
            f"of that name. Use another name, such as '{name}_adapter'."
        )


def require_fusion_name(argument: str, name: object) -> None:
    """Raise `ConfigError` unless a fusion may have this name: an adapter name, or several joined by commas."""
    for part in name.split(",") if isinstance(name, str) else [name]:
        require_adapter_name(argument, part)
