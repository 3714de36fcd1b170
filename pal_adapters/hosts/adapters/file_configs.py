"""The configuration files of saved adapters and fusions: checked against the model before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.configuration import (
    ADAPTER_CONFIG_MAP,
    ADAPTERFUSION_CONFIG_MAP,
    AdapterConfig,
    AdapterFusionConfig,
    ConfigUnion,
)
from adapters.loading import AdapterFusionLoader, AdapterLoader, PredictionHeadLoader, WeightsLoaderHelper
from adapters.model_mixin import ModelAdaptersMixin
from adapters.utils import (
    ADAPTERFUSION_WEIGHTS_NAME,
    HEAD_CONFIG_NAME,
    HEAD_WEIGHTS_NAME,
    SAFE_ADAPTERFUSION_WEIGHTS_NAME,
    SAFE_HEAD_WEIGHTS_NAME,
    resolve_adapter_path,
)

from pal_adapters.errors import ConfigError, PalAdaptersError, StorageError
from pal_adapters.hosts.names import require_adapter_name, require_fusion_name

from .composition import architectures
from .config import TaskAdapterConfig, any_registered
from .fusion import PRESETS, combination_config

_FUSION_WEIGHTS = (ADAPTERFUSION_WEIGHTS_NAME, SAFE_ADAPTERFUSION_WEIGHTS_NAME)
_ONLY_AT_START = ("init_weights", "init_weights_seed")


def adapter_load(original: Any) -> Any:
    """`AdapterLoader.load`, which first checks that the file's config fits the model."""

    def load(
        self: AdapterLoader,
        adapter_name_or_path: str,
        config: Any = None,
        version: str | None = None,
        model_name: str | None = None,
        load_as: str | None = None,
        loading_info: Any = None,
        leave_out: Any = None,
        set_active: bool = False,
        **kwargs: Any,
    ) -> Any:
        requested = AdapterConfig.load(config) if config else None
        name = self.model.model_name or model_name
        folder = resolve_adapter_path(adapter_name_or_path, name, adapter_config=requested, version=version, **kwargs)
        _check_adapter(self.model, *_read(self.weights_helper, folder), load_as, leave_out)
        return original(
            self, folder, config, version, model_name, load_as, loading_info, leave_out, set_active, **kwargs
        )

    return load


def fusion_load(original: Any) -> Any:
    """`AdapterFusionLoader.load`, which first checks that the file's config fits the model."""

    def load(
        self: AdapterFusionLoader, save_directory: str, load_as: Any = None, loading_info: Any = None, **kwargs: Any
    ) -> Any:
        if any(Path(save_directory).glob("*adapter_fusion*")):
            _check_fusion(self.model, *_read(self.weights_helper, save_directory), load_as)
            if not any(Path(save_directory, name).is_file() for name in _FUSION_WEIGHTS):
                raise StorageError(f"{save_directory} has no {' or '.join(_FUSION_WEIGHTS)}: save the fusion again.")
        return original(self, save_directory, load_as, loading_info, **kwargs)

    return load


def head_load(original: Any) -> Any:
    """`PredictionHeadLoader.load`, whose errors name the file."""

    def load(
        self: PredictionHeadLoader, save_directory: str, load_as: Any = None, loading_info: Any = None, **kwargs: Any
    ) -> Any:
        config = Path(save_directory, HEAD_CONFIG_NAME)
        names = (SAFE_HEAD_WEIGHTS_NAME, HEAD_WEIGHTS_NAME)
        if config.is_file() and not any(Path(save_directory, name).is_file() for name in names):
            raise StorageError(f"{save_directory} has no {' or '.join(names)}: the folder is incomplete.")
        try:
            return original(self, save_directory, load_as, loading_info, **kwargs)
        except AttributeError as error:
            if "head type" not in str(error):
                raise
            raise StorageError(f"{config} does not fit this {type(self.model).__name__}: {error}") from error

    return load


def load_weights_config(original: Any) -> Any:
    """`WeightsLoaderHelper.load_weights_config`, whose errors name the file."""

    def wrapper(self: WeightsLoaderHelper, save_directory: str) -> dict[str, Any]:
        path = Path(save_directory, self.config_name)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(f"{path} cannot be read ({error}): the folder is damaged, save it again.") from error
        if not isinstance(config, dict) or "config" not in config or "name" not in config:
            raise StorageError(f"{path} is not the configuration of something saved: it needs 'name' and 'config'.")
        if not isinstance(config.get("version", ""), str):
            raise StorageError(f"{path} has version={config['version']!r}: it needs a string.")
        return dict(original(self, save_directory))

    return wrapper


def _read(helper: WeightsLoaderHelper, folder: str) -> tuple[dict[str, Any], Path]:
    config, path = helper.load_weights_config(folder), Path(folder, helper.config_name)
    if not isinstance(config["name"], str):
        raise StorageError(f"{path} has name={config['name']!r}: it needs a string.")
    return config, path


def _check_adapter(model: ModelAdaptersMixin, file: dict[str, Any], path: Path, load_as: Any, leave_out: Any) -> None:
    name = load_as or file["name"]
    known = model.adapters_config.get(name)
    if not _says_what(file["config"], ADAPTER_CONFIG_MAP):
        raise StorageError(f"{path} has config={file['config']!r}: it needs a mapping, or names of presets.")
    try:
        config = AdapterConfig.load(file["config"])
    except PalAdaptersError as error:
        raise type(error)(f"{path} does not fit: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} has a config that neither adapters nor pal_adapters knows ({type(error).__name__}: {error})."
        ) from error
    if not any_registered(architectures(config)) and not any_registered(architectures(known)):
        return
    require_adapter_name("load_as" if load_as else "name", name)
    _check_model(model, file, path)
    if known is not None and _described(known) != _described(config, leave_out):
        raise ConfigError(
            f"the model has an adapter {name!r} with another config than {path}: delete it with delete_adapter, or "
            "pass load_as."
        )


def _says_what(config: Any, presets: Mapping[str, Any]) -> bool:
    """Whether a config in a file is one. The host takes other strings for paths, and a default for an empty one."""
    if isinstance(config, str):
        return all(part.partition("[")[0] in presets for part in config.split("|"))
    return isinstance(config, Mapping) and bool(config)


def _check_model(model: ModelAdaptersMixin, file: Mapping[str, Any], path: Path) -> None:
    """Raise `ConfigError` if a file was saved from another type of model, or from one of another width."""
    for field, what in (("model_type", "type"), ("hidden_size", "width")):
        saved, own = file.get(field), getattr(model.config, field, None)
        if saved is not None and own is not None and saved != own:
            raise ConfigError(
                f"{path} was saved from a model of {what} {saved!r}, and this {type(model).__name__} has {what} "
                f"{own!r}: load it into the model that it was trained on."
            )


def _described(config: Any, leave_out: Any = None) -> list[dict[str, Any]]:
    """What determines the function of an adapter in its config: its options, or those of a union's members."""
    config = AdapterConfig.load(config)
    described = []
    for member in config.configs if isinstance(config, ConfigUnion) else [config]:
        options = (member.resolved() if isinstance(member, TaskAdapterConfig) else member).to_dict()
        options["leave_out"] = sorted({*options.get("leave_out", ()), *(leave_out or ())})
        free = {*_ONLY_AT_START, *getattr(member, "storage_only", ())}
        described.append({name: value for name, value in options.items() if name not in free})
    return described


def _check_fusion(model: Any, file: dict[str, Any], path: Path, load_as: Any) -> None:
    """Raise `ConfigError` if a fusion of this package does not fit, or would overwrite another of the same name."""
    config = file["config"]
    try:
        ours = combination_config(config)
        if isinstance(config, Mapping) and ours is None:
            AdapterFusionConfig.from_dict(config)
    except PalAdaptersError as error:
        raise type(error)(f"{path} does not fit: {error}") from error
    except TypeError as error:
        raise ConfigError(f"{path} has a config that neither adapters nor pal_adapters knows ({error}).") from error
    if not _says_what(config, {**ADAPTERFUSION_CONFIG_MAP, **PRESETS}):
        raise ConfigError(f"{path} has config={config!r}: it needs a mapping, or the name of a preset.")
    name = load_as or file["name"]
    known, names = model.adapters_config.get_fusion(name)
    known = combination_config(known)
    if ours is not None:
        require_fusion_name("load_as" if load_as else "name", name)
        sources = file.get("adapter_names", name.split(","))
        if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
            raise ConfigError(f"{path} has adapter_names={sources!r}: it needs a list of adapter names.")
        _check_model(model, file, path)
    if name not in model.adapters_config.fusions or (known is None and ours is None):
        return
    if known is None or ours is None or known != ours or list(file.get("adapter_names", names)) != list(names):
        raise ConfigError(
            f"the model has another fusion with the name {name!r}: delete it with delete_adapter_fusion, or pass "
            "load_as."
        )
