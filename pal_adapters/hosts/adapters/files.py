"""Files of adapters and fusions in `adapters`: which tensors they hold, and what a file does that cannot be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters.loading import AdapterFusionLoader, AdapterLoader
from adapters.model_mixin import ModelAdaptersMixin

from pal_adapters.errors import ConfigError, PalAdaptersError

from . import fusion as adapters_fusion
from .config import task_configs
from .layer import base_parameters, trains_originals


def _prefix(model: ModelAdaptersMixin) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def filter_func(original: Any) -> Any:
    """`AdapterLoader.filter_func` that keeps shared tensors and a jointly trained base."""

    def filter_func(self: AdapterLoader, adapter_name: str) -> Callable[[str], bool]:
        keep = original(self, adapter_name)
        configs = list(task_configs(self.model.adapters_config.get(adapter_name)))
        table = f"shared_parameters.{adapter_name}."
        ours = tuple(f"{table}{config.method.name}_stack" for config in configs)
        prefix = _prefix(self.model)
        base: set[str] = set()
        if any(map(trains_originals, configs)):
            base = {prefix + name for name in base_parameters(self.model.base_model)}

        def kept(key: str) -> bool:
            if any(start in key for start in ours):
                # An encoder-decoder has the same table three times, and safetensors refuses aliases.
                return key.startswith(prefix + table)
            return keep(key) or key.startswith(table) or key in base

        return kept

    return filter_func


def rename_func(original: Any) -> Any:
    """`AdapterLoader.rename_func` that renames shared tensors too."""

    def rename_func(self: AdapterLoader, old_name: str, new_name: str) -> Callable[[str], str]:
        rename = original(self, old_name, new_name)
        start = f"shared_parameters.{old_name}."

        def renamed(key: str) -> str:
            if key.startswith(start):
                return f"shared_parameters.{new_name}.{key.removeprefix(start)}"
            return rename(key)

        return renamed

    return rename_func


def adapter_load(original: Any) -> Any:
    """`AdapterLoader.load` that leaves the model as it was where it fails."""

    def load(self: AdapterLoader, adapter_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        known, setup = self.model.adapters_config, self.model.active_adapters
        before = set(known.adapters)
        try:
            return original(self, adapter_name_or_path, *args, **kwargs)
        except Exception as error:  # whatever it was, the model goes back to what it was
            for added in set(known.adapters) - before:
                self.model.delete_adapter(added)
            known.active_setup = setup
            if isinstance(error, RuntimeError) and "size mismatch" in str(error):
                first = next(line for line in str(error).splitlines() if "size mismatch" in line)
                raise ConfigError(
                    f"the adapter in {adapter_name_or_path} does not fit this {type(self.model).__name__}, it was "
                    f"made for a model of another size: {first.strip()}"
                ) from error
            raise

    return load


def fusion_filter_func(original: Any) -> Any:
    """`AdapterFusionLoader.filter_func` that takes whole names."""

    def filter_func(self: AdapterFusionLoader, adapter_fusion_name: str) -> Callable[[str], bool]:
        return lambda key: f"adapter_fusion_layer.{adapter_fusion_name}." in key

    return filter_func


def fusion_rename_func(original: Any) -> Any:
    """`AdapterFusionLoader.rename_func` for such names."""

    def rename_func(self: AdapterFusionLoader, old_name: str, new_name: str) -> Callable[[str], str]:
        return lambda key: key.replace(f"adapter_fusion_layer.{old_name}.", f"adapter_fusion_layer.{new_name}.")

    return rename_func


def fusion_load(original: Any) -> Any:
    """`AdapterFusionLoader.load` that leaves the model as it was where it fails."""

    def load(
        self: AdapterFusionLoader, save_directory: str, load_as: Any = None, loading_info: Any = None, **kwargs: Any
    ) -> Any:
        folder = Path(save_directory)
        try:
            config = self.weights_helper.load_weights_config(save_directory)
        except (OSError, ValueError):
            if folder.is_dir() and any(folder.glob("*adapter_fusion*")):
                raise ConfigError(f"{save_directory} has no readable adapter_fusion_config.json.") from None
            return original(self, save_directory, load_as, loading_info, **kwargs)
        model, name = self.model, load_as or config["name"]
        if adapters_fusion.check_file(model, config, name) is None:
            return original(self, save_directory, load_as, loading_info, **kwargs)
        known = name in model.adapters_config.fusions
        before, setup = adapters_fusion.coefficients_of(model, name), model.active_adapters
        info: dict[str, list[str]] = {}
        try:
            result = original(self, save_directory, load_as, info, **kwargs)
            if info.get("missing_keys"):
                raise ValueError(f"it has no {', '.join(info['missing_keys'])}")
        except (OSError, RuntimeError, ValueError) as error:
            if known:
                model.load_state_dict(before, strict=False)
            elif name in model.adapters_config.fusions:
                model.delete_adapter_fusion(name)
            model.adapters_config.active_setup = setup
            if isinstance(error, PalAdaptersError):
                raise
            raise ConfigError(f"the fusion in {save_directory} cannot be loaded: {error}") from error
        if isinstance(loading_info, dict):
            for key, values in info.items():
                loading_info.setdefault(key, []).extend(values)
        return result

    return load
