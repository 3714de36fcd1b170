"""Registration with `adapters`, and the table of everything in it that is replaced.

`REPLACED` is applied once, when the first method registers. The wrappers are in the modules
they belong to. What is called or subclassed without being replaced is listed in `expectations`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adapters import AdapterTrainer
from adapters.composition import Fuse
from adapters.configuration import ADAPTER_CONFIG_MAP, AdapterConfig, ModelAdaptersConfig
from adapters.configuration.adapter_fusion_config import ADAPTERFUSION_CONFIG_MAP, AdapterFusionConfig
from adapters.interface import AdapterMethod
from adapters.loading import AdapterFusionLoader, AdapterLoader, PredictionHeadLoader, WeightsLoaderHelper
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.lora import LoRALinear
from adapters.model_mixin import ModelAdaptersMixin, ModelWithHeadsAdaptersMixin

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.expectations import Touch, check_host, warn_untested

from . import adding, adding_fusion, bottlenecks, deleting, file_configs, files, lora, setup, trainer, whole_model
from .config import CONFIGS, TaskAdapterConfig
from .expectations import RELIED_ON
from .fusion import FUSIONS, PRESETS, CombinationConfig
from .transactions import whole

_ORIGINAL = "_pal_adapters_original"


class Replaced(NamedTuple):
    """A symbol of the host that is replaced.

    Attributes:
        owner: its class.
        name: its name.
        arguments: what the original takes.
        make: gives the wrapper for the original.
        reason: why it is replaced.
    """

    owner: type
    name: str
    arguments: tuple[str, ...]
    make: Callable[[Any], Callable[..., Any]]
    reason: str

    def expected(self) -> Touch:
        path = f"{self.owner.__module__}:{self.owner.__qualname__}.{self.name}"
        return Touch(path, self.arguments, self.reason)


def _whole(make: Callable[[Any], Callable[..., Any]]) -> Callable[[Any], Callable[..., Any]]:
    return lambda original: whole(make(original))


_MODEL, _HEADS = ModelAdaptersMixin, ModelWithHeadsAdaptersMixin
_LOAD = ("custom_weights_loaders", "set_active", "use_safetensors", "kwargs")
_SAVE = ("meta_dict", "custom_weights_loaders", "use_safetensors")
_SETUP = ("self", "adapter_setup_name_or_path", "version", *_LOAD)
_STATE = ("self", "adapter_setup", "state", "lvl")

REPLACED: tuple[Replaced, ...] = (
    # Configs
    Replaced(
        AdapterConfig, "_get_config_class", ("config_dict",), whole_model.get_config_class,
        "its table of architectures cannot be extended",
    ),
    Replaced(
        AdapterMethod, "get_from_config", ("config",), whole_model.get_from_config,
        "a model's interface would have to list this package's methods; the model itself shows whether they fit",
    ),
    Replaced(
        AdapterFusionConfig, "load", ("config", "kwargs"), adding_fusion.load_config,
        "it makes a fusion of its own kind from whatever it finds",
    ),
    Replaced(
        ModelAdaptersConfig, "get_fusion", ("self", "fusion_name"), adding_fusion.get_fusion,
        "it finds no preset of this package",
    ),
    Replaced(
        _MODEL, "supports_adapter", ("self", "type_or_config"), adding.supports_adapter,
        "the model itself shows whether a config of this package fits",
    ),
    # Adding, averaging and loading, whole or not at all
    Replaced(
        _MODEL, "add_adapter", ("self", "adapter_name", "config", "overwrite_ok", "set_active"),
        lambda original: whole(adding.add_adapter_to_whole(adding.add_adapter(original))),
        "says why a config does not fit; the host leaves parts of a rejected adapter",
    ),
    Replaced(
        _HEADS, "add_adapter", ("self", "adapter_name", "config", "overwrite_ok", "set_active"),
        _whole(adding.add_adapter_to_whole), "weights that train in place may be tied to the head",
    ),
    Replaced(
        _MODEL, "_add_adapter_weights", ("self", "adapter_name"), adding.add_adapter_weights,
        "gives blocks their TaskLayer before the first use",
    ),
    Replaced(
        _MODEL, "average_adapter",
        ("self", "adapter_name", "adapter_list", "weights", "combine_strategy", "normalize_weights", "overwrite_ok",
         "set_active", "svd_rank"),
        _whole(adding.average_adapter), "the host leaves parts of a rejected average, and takes weights that are NaN",
    ),
    *(
        Replaced(
            owner, "train_adapter", ("self", "adapter_setup", "train_embeddings"), whole,
            "the host freezes the model before it rejects a setup",
        )
        for owner in (_MODEL, _HEADS)
    ),
    Replaced(
        _MODEL, "add_adapter_fusion", ("self", "adapter_names", "config", "name", "overwrite_ok", "set_active"),
        _whole(adding_fusion.add_adapter_fusion),
        "reads this package's configs, dicts if from a file; rejects sources that cannot be fused; links coefficients "
        "that blocks share; the host leaves parts of a rejected fusion",
    ),
    Replaced(
        _MODEL, "delete_adapter", ("self", "adapter_name"), _whole(deleting.delete_adapter),
        "the host keeps configs of deleted adapters, and leaves parts if deleting fails",
    ),
    Replaced(
        _MODEL, "delete_adapter_fusion", ("self", "adapter_names"), _whole(deleting.delete_adapter_fusion),
        "the host keeps configs and names of deleted fusions, and leaves parts if deleting fails",
    ),
    Replaced(
        _MODEL, "load_adapter",
        ("self", "adapter_name_or_path", "config", "version", "model_name", "load_as", "custom_weights_loaders",
         "leave_out", "id2label", "set_active", "use_safetensors", "kwargs"),
        whole, "the host leaves parts of an adapter that cannot be loaded",
    ),
    Replaced(
        _HEADS, "load_head", ("self", "save_directory", "load_as", "id2label", "use_safetensors", "kwargs"),
        whole, "the host leaves parts of a head that cannot be loaded",
    ),
    Replaced(
        _MODEL, "load_adapter_fusion", ("self", "adapter_fusion_name_or_path", "load_as", *_LOAD),
        whole, "the host leaves parts of a fusion that cannot be loaded",
    ),
    *(
        Replaced(
            owner, "load_adapter_setup", _SETUP, setup.load_adapter_setup,
            "the host keeps what it loaded before a part that cannot be loaded",
        )
        for owner in (_MODEL, _HEADS)
    ),
    Replaced(
        _MODEL, "init_adapters", ("self", "model_config", "adapters_config"), adding_fusion.init_adapters,
        "links shared coefficients of a model that comes with its fusions",
    ),
    # Files
    Replaced(
        AdapterLoader, "save", ("self", "save_directory", "name", "meta_dict"), files.save,
        "pretrained weights of several adapters are stored once, in files of their own",
    ),
    *(
        Replaced(owner, "save_all_adapters", ("self", "save_directory", *more), files.save_adapters, "the same")
        for owner, more in ((_MODEL, _SAVE), (_HEADS, ("with_head", *_SAVE)))
    ),
    *(
        Replaced(
            owner, "save_adapter_setup", ("self", "save_directory", "adapter_setup", *more), files.save_adapters,
            "the same",
        )
        for owner, more in ((_MODEL, _SAVE), (_HEADS, ("head_setup", *_SAVE)))
    ),
    Replaced(WeightsLoaderHelper, "state_dict", ("self", "filter_func"), files.state_dict, "the same"),
    Replaced(
        AdapterLoader, "filter_func", ("self", "adapter_name"), files.filter_func,
        "the host overlooks shared_parameters of a model without a head, and a jointly trained base",
    ),
    Replaced(
        AdapterLoader, "rename_func", ("self", "old_name", "new_name"), files.rename_func,
        "the host overlooks shared_parameters of a model without a head",
    ),
    Replaced(
        AdapterLoader, "load",
        ("self", "adapter_name_or_path", "config", "version", "model_name", "load_as", "loading_info", "leave_out",
         "set_active", "kwargs"),
        file_configs.adapter_load, "the host does not ask whether a file fits the model",
    ),
    Replaced(
        AdapterFusionLoader, "filter_func", ("self", "adapter_fusion_name"), files.fusion_filter_func,
        "the host takes a,b,c for a part of a,b",
    ),
    Replaced(
        AdapterFusionLoader, "rename_func", ("self", "old_name", "new_name"), files.fusion_rename_func,
        "the host takes a,b,c for a part of a,b",
    ),
    Replaced(
        AdapterFusionLoader, "load", ("self", "save_directory", "load_as", "loading_info", "kwargs"),
        file_configs.fusion_load, "the host does not ask whether a file fits the model",
    ),
    Replaced(
        PredictionHeadLoader, "filter_func", ("self", "head_name"), files.head_filter_func,
        "the host leaves what a file lacks at random values",
    ),
    Replaced(
        PredictionHeadLoader, "load", ("self", "save_directory", "load_as", "loading_info", "kwargs"),
        file_configs.head_load, "the host does not say that the weights of a head are missing",
    ),
    Replaced(
        WeightsLoaderHelper, "load_weights_config", ("self", "save_directory"), file_configs.load_weights_config,
        "the host's errors do not name the file",
    ),
    Replaced(
        WeightsLoaderHelper, "load_weights",
        ("self", "save_directory", "filter_func", "rename_func", "loading_info", "in_base_model"), files.load_weights,
        "the host's errors name neither the file nor the cause",
    ),
    Replaced(
        WeightsLoaderHelper, "load_weights_from_state_dict",
        ("self", "state_dict", "filter_func", "rename_func", "loading_info", "in_base_model", "start_prefix"),
        files.load_weights_from_state_dict, "the host leaves missing tensors at random values",
    ),
    Replaced(
        Fuse, "_get_save_kwargs", ("self",), setup.fuse_kwargs, "the host does not save the custom name of a fusion",
    ),
    Replaced(
        AdapterTrainer, "_load_adapter_fusions", ("self", "resume_from_checkpoint"), trainer.load_adapter_fusions,
        "the host does not restore fusions with custom names",
    ),
    Replaced(
        AdapterTrainer, "_load_best_model", ("self",), trainer.load_best_model,
        "the host does not restore the head of a fusion",
    ),
    # Whole models
    Replaced(
        _MODEL, "merge_adapter", ("self", "name"), whole_model.merge_adapter, "the host skips what it cannot merge",
    ),
    Replaced(
        _MODEL, "_prepare_model_inputs", ("self", "args", "kwargs"), whole_model.prepare_model_inputs,
        "generation repeats tensors for its beams, but not a list of task_ids",
    ),
    Replaced(
        _HEADS, "freeze_embeddings", ("self", "freeze"), whole_model.freeze_embeddings,
        "the host freezes an embedding tied to the head, even if the base is trained",
    ),
    Replaced(
        _MODEL, "train_adapter_fusion", ("self", "adapter_setup", "unfreeze_adapters"), whole,
        "the host freezes the model before it rejects a setup",
    ),
    Replaced(
        _HEADS, "train_adapter_fusion", ("self", "adapter_setup", "unfreeze_adapters"),
        _whole(adding_fusion.train_adapter_fusion),
        "the host does not tell a head model, which has the loss, of fusions that its base was loaded with; it "
        "freezes the model before it rejects a setup",
    ),
    # The forward pass
    Replaced(
        BottleneckLayer, "bottleneck_layer_forward", ("self", "hidden_states", "residual_input", "layer_norm"),
        bottlenecks.bottleneck_layer_forward, "compositions that mix task modules with bottlenecks",
    ),
    Replaced(
        BottleneckLayer, "add_fusion_layer", ("self", "adapter_names"), adding_fusion.add_fusion_layer,
        "the host always creates its own class of fusion layer",
    ),
    Replaced(
        BottleneckLayer, "compose_fuse", _STATE, bottlenecks.compose_fuse,
        "fusions of this package need no query, and compute one wide bottleneck",
    ),
    Replaced(
        LoRALinear, "pad_and_concat", ("self", "states"), lora.pad_and_concat, "examples of adapters without LoRA",
    ),
    Replaced(LoRALinear, "compose_average", _STATE, lora.compose_average, "examples of adapters without LoRA"),
    Replaced(LoRALinear, "compose_multi_task", _STATE, lora.compose_multi_task, "examples of adapters without LoRA"),
)  # fmt: skip


def register(config_class: type[TaskAdapterConfig], presets: dict[str, TaskAdapterConfig]) -> None:
    """Make a method known to the host: its architecture and the strings of its presets. Idempotent.

    Raises:
        ConfigError: if the host or another plugin already owns one of the strings.
        MissingHostError: if the installed version does not have what the binding needs.
    """
    install()
    for name, preset in presets.items():
        owner = ADAPTER_CONFIG_MAP.get(name)
        if owner is not None and type(owner) is not type(preset):
            raise ConfigError(f"adapters already has a config named {name!r} ({type(owner).__name__}).")
        ADAPTER_CONFIG_MAP[name] = preset
    CONFIGS[config_class.method.name] = config_class


def register_fusion(config_class: type[CombinationConfig], presets: Mapping[str, CombinationConfig]) -> None:
    """Make a fusion known to the host: its config class and the strings of its presets. Idempotent.

    Raises:
        ConfigError: if the host or another plugin already owns one of the strings.
        MissingHostError: if the installed version does not have what the binding needs.
    """
    install()
    for name, preset in presets.items():
        owner = ADAPTERFUSION_CONFIG_MAP.get(name, PRESETS.get(name))
        if owner is not None and type(owner) is not config_class:
            raise ConfigError(f"adapters already has a fusion named {name!r} ({type(owner).__name__}).")
        PRESETS[name] = preset
    FUSIONS[str(next(iter(presets.values())).architecture)] = config_class


@functools.cache
def install() -> None:
    """Replace what `REPLACED` lists, once, after checking that the installed host is as expected."""
    check_host("adapters", [*(replaced.expected() for replaced in REPLACED), *RELIED_ON])
    warn_untested("adapters")
    for replaced in REPLACED:
        _wrap(replaced)


def _wrap(replaced: Replaced) -> None:
    original = getattr(replaced.owner, replaced.name)
    if hasattr(original, _ORIGINAL):  # by an earlier import of this package
        return
    wrapper = functools.wraps(original)(replaced.make(original))
    setattr(wrapper, _ORIGINAL, original)
    # The original of a classmethod is bound already.
    static = isinstance(inspect.getattr_static(replaced.owner, replaced.name), (staticmethod, classmethod))
    setattr(replaced.owner, replaced.name, staticmethod(wrapper) if static else wrapper)
