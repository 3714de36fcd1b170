"""The methods, each in its own folder, which imports no other method.

A folder holds the maths (`layer.py`, plain torch), the options (`config.py`) and a binding for each host
(`adapters.py`, `peft.py`), which ends with a call of that host's `register`. Folders are discovered automatically.
`shared.py` has code used by several methods, `released.py` code that only reproduces faults of released code.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from pal_adapters.errors import ConfigError, PalAdaptersError
from pal_adapters.hosts.method import REGISTERED, Options


def folders() -> list[str]:
    """The names of the methods' folders."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def load(host: str) -> dict[str, type[Options]]:
    """Import the bindings of all methods for a host.

    Returns:
        The config classes that they register, by name.

    Raises:
        PalAdaptersError: if a binding does not register the configs it defines.
    """
    public: dict[str, type[Options]] = {}
    for folder in folders():
        package = importlib.import_module(f"{__name__}.{folder}")
        if host in {module.name for module in pkgutil.iter_modules(package.__path__)}:
            public |= registered_in(importlib.import_module(f"{package.__name__}.{host}"), host)
    return public


def registered_in(binding: ModuleType, host: str) -> dict[str, type[Options]]:
    """The config classes that a binding has registered, by name.

    Raises:
        PalAdaptersError: if it has not registered all configs that it defines, or defines none.
    """
    defined = {
        name: value
        for name, value in vars(binding).items()
        if isinstance(value, type) and issubclass(value, Options) and value.__module__ == binding.__name__
    }
    missing = [name for name, value in defined.items() if value not in REGISTERED[host].values()]
    if missing or not defined:
        fault = f"defines {missing[0]} but does not register it" if missing else "defines no config"
        raise PalAdaptersError(
            f"{binding.__file__} {fault}: end it with register({missing[0] if missing else '<its config>'}), from "
            f"pal_adapters.hosts.{host}.registration."
        )
    return defined


def register_method(*config_classes: type[Options]) -> None:
    """Register a method of another package with the hosts.

    Its configs then work like those of this package: in `add_adapter` and `get_peft_model`, by string
    (`"<name>[hidden_size=12]"`, in adapters), and when a saved adapter is loaded. Call it when your package is
    imported. Registering a class again does nothing.

    Args:
        config_classes: the method's config for adapters, which derives from
            `pal_adapters.hosts.adapters.config.TaskAdapterConfig`, the one for PEFT, which derives from
            `pal_adapters.hosts.peft.config.TaskPeftConfig`, or both.

    Raises:
        ConfigError: for a class that is neither, or a name that is taken.

    Example:
        ```python
        pal_adapters.register_method(NeighboursConfig, NeighboursPeftConfig)
        ```
    """
    for config_class in config_classes:
        host = getattr(config_class, "host", None)
        if host not in REGISTERED:
            raise ConfigError(
                f"config_class={config_class!r} is not allowed: pass a dataclass that derives from TaskAdapterConfig "
                "or TaskPeftConfig."
            )
        # Only installed hosts can be imported.
        importlib.import_module(f"pal_adapters.hosts.{host}.registration").register(config_class)
