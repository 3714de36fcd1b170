"""Saved setups: they keep the name of a fusion, and are loaded whole or not at all."""

from __future__ import annotations

from typing import Any

from adapters.composition import Fuse
from adapters.model_mixin import ModelAdaptersMixin

from pal_adapters.errors import ConfigError

from .transactions import changing


def fuse_kwargs(original: Any) -> Any:
    """`Fuse._get_save_kwargs`, with the custom name of a fusion, without which a saved setup does not find it."""

    def wrapper(self: Fuse) -> Any:
        return {"name": self._name} if self._name else original(self)

    return wrapper


def load_adapter_setup(original: Any) -> Any:
    """`load_adapter_setup`, whole or not at all, with an error that names the setup."""

    def wrapper(self: ModelAdaptersMixin, adapter_setup_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            with changing(self):
                return original(self, adapter_setup_name_or_path, *args, **kwargs)
        except OSError as error:
            raise ConfigError(
                f"the setup in {adapter_setup_name_or_path} cannot be loaded: {str(error).strip()}"
            ) from error

    return wrapper
