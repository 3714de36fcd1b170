"""Adding a fusion to a model of `adapters`: checks its sources, links shared coefficients, watches its penalty."""

from __future__ import annotations

from typing import Any

from adapters.composition import Fuse
from adapters.configuration import ModelAdaptersConfig
from adapters.configuration.adapter_fusion_config import ADAPTERFUSION_CONFIG_MAP, AdapterFusionConfig
from adapters.methods.bottleneck import BottleneckLayer
from adapters.model_mixin import ModelAdaptersMixin, ModelWithHeadsAdaptersMixin
from adapters.utils import resolve_adapter_config

from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.hosts.names import require_fusion_name

from . import penalty
from .composition import architectures
from .config import any_registered
from .fusion import PRESETS, add_layer, combination_config, link
from .layer import unfusable
from .network import whole_model_loaded
from .sources import check_sources


def load_config(original: Any) -> Any:
    """`AdapterFusionConfig.load`, for this package's presets, dicts and files."""

    def wrapper(config: Any, **kwargs: Any) -> AdapterFusionConfig:
        resolved = resolve_adapter_config(config, local_map={**ADAPTERFUSION_CONFIG_MAP, **PRESETS})
        ours = combination_config(resolved)
        return original(resolved, **kwargs) if ours is None else ours.replace(**kwargs)

    return wrapper


def get_fusion(original: Any) -> Any:
    """`ModelAdaptersConfig.get_fusion`, also for the name of a preset, which earlier releases wrote into files."""

    def wrapper(self: ModelAdaptersConfig, fusion_name: str | list[str]) -> tuple[Any, Any]:
        config, names = original(self, fusion_name)
        if config is None and names is not None:
            key = fusion_name if isinstance(fusion_name, str) else ",".join(fusion_name)
            config = combination_config(self.fusions[key])
        return config, names

    return wrapper


def add_adapter_fusion(original: Any) -> Any:
    """`ModelAdaptersMixin.add_adapter_fusion`, with this package's configs, and with task modules as sources."""

    def wrapper(
        self: ModelAdaptersMixin,
        adapter_names: Any,
        config: Any = None,
        name: str | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> Any:
        children = adapter_names.split(",") if isinstance(adapter_names, str) else adapter_names
        names = [child if isinstance(child, str) else child.last() for child in children]
        ours = combination_config(config)
        if ours is not None:
            key = name or (adapter_names.name if isinstance(adapter_names, Fuse) else ",".join(names))
            check_sources(self.adapters_config, names)
            require_fusion_name("name", key)
            if key in self.adapters_config.fusions and not overwrite_ok:
                raise ConfigError(
                    f"the model has a fusion with the name {key!r}: delete it, or pass overwrite_ok=True."
                )
            adapter_names, name, config = names, key, ours
        if any(any_registered(architectures(self.adapters_config.get(source))) for source in names):
            for reason in filter(None, (unfusable(names, layer.task_layer) for _, layer in self.iter_layers())):
                raise UnsupportedError(reason)
        result = original(self, adapter_names, config, name, overwrite_ok, set_active)
        if ours is not None:
            link(self)
            penalty.watch(self)
        return result

    return wrapper


def init_adapters(original: Any) -> Any:
    """`ModelAdaptersMixin.init_adapters`, for a model that comes with adapters and fusions."""

    def wrapper(self: ModelAdaptersMixin, *args: Any, **kwargs: Any) -> None:
        with whole_model_loaded():
            original(self, *args, **kwargs)
        configs = self.adapters_config.fusion_config_map
        for key, config in configs.items():  # dicts, from the config file of a whole model
            configs[key] = combination_config(config) or config
        link(self)
        penalty.watch(self)

    return wrapper


def train_adapter_fusion(original: Any) -> Any:
    """`ModelWithHeadsAdaptersMixin.train_adapter_fusion`, for a head model around a base that came with fusions."""

    def wrapper(self: ModelWithHeadsAdaptersMixin, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        penalty.watch(self)

    return wrapper


def add_fusion_layer(original: Any) -> Any:
    """`BottleneckLayer.add_fusion_layer`, with the layers of this package's fusions."""

    def wrapper(self: BottleneckLayer, adapter_names: Any) -> None:
        name = adapter_names if isinstance(adapter_names, str) else ",".join(adapter_names)
        config, names = self.adapters_config.get_fusion(name)
        ours = combination_config(config)
        if ours is None:
            original(self, adapter_names)
        else:
            add_layer(self, name, ours, names)

    return wrapper
