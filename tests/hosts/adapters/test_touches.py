"""One test for each symbol of `adapters` that is replaced or relied on: what moves upstream fails here by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import adapters
import pytest
from adapters import composition, context, interface, loading, model_mixin, utils
from adapters.configuration import (
    ADAPTER_CONFIG_MAP,
    AdapterConfig,
    ConfigUnion,
    ModelAdaptersConfig,
    adapter_fusion_config,
)
from adapters.methods import adapter_layer_base, bottleneck, lora, modeling
from packaging.version import Version
from torch import nn

from pal_adapters.hosts.adapters import patches as host
from pal_adapters.hosts.adapters.composition import ValueComposition
from pal_adapters.hosts.adapters.config import CONFIGS
from pal_adapters.hosts.adapters.fusion import FUSIONS

from .tiny import SMALL


def original(owner: Any, name: str) -> Callable[..., Any]:
    """The host's own function, behind our wrapper if there is one."""
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone"
    function = getattr(owner, name)
    return getattr(function, "_pal_adapters_original", function)


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


# What is wrapped: the names of the original's arguments.
WRAPPED: dict[str, tuple[Any, list[str]]] = {
    "AdapterConfig._get_config_class": (AdapterConfig, ["config_dict"]),
    "AdapterMethod.get_from_config": (interface.AdapterMethod, ["config"]),
    "ModelAdaptersMixin.supports_adapter": (model_mixin.ModelAdaptersMixin, ["self", "type_or_config"]),
    "ModelAdaptersMixin.add_adapter": (
        model_mixin.ModelAdaptersMixin, ["self", "adapter_name", "config", "overwrite_ok", "set_active"],
    ),
    "ModelAdaptersMixin._add_adapter_weights": (model_mixin.ModelAdaptersMixin, ["self", "adapter_name"]),
    "ModelAdaptersMixin.add_adapter_fusion": (
        model_mixin.ModelAdaptersMixin, ["self", "adapter_names", "config", "name", "overwrite_ok", "set_active"],
    ),
    "ModelAdaptersMixin.init_adapters": (
        model_mixin.ModelAdaptersMixin, ["self", "model_config", "adapters_config"],
    ),
    "ModelAdaptersMixin._load_adapter_setup_weights": (
        model_mixin.ModelAdaptersMixin,
        ["self", "load_directory", "adapter_setup", "custom_weights_loaders", "set_active", "use_safetensors"],
    ),
    "ModelAdaptersMixin.merge_adapter": (model_mixin.ModelAdaptersMixin, ["self", "name"]),
    "ModelAdaptersMixin._prepare_model_inputs": (model_mixin.ModelAdaptersMixin, ["self", "args", "kwargs"]),
    "ModelWithHeadsAdaptersMixin.freeze_embeddings": (model_mixin.ModelWithHeadsAdaptersMixin, ["self", "freeze"]),
    "ModelWithHeadsAdaptersMixin.train_adapter_fusion": (
        model_mixin.ModelWithHeadsAdaptersMixin, ["self", "adapter_setup", "unfreeze_adapters"],
    ),
    "Fuse._get_save_kwargs": (composition.Fuse, ["self"]),
    "BottleneckLayer.bottleneck_layer_forward": (
        bottleneck.BottleneckLayer, ["self", "hidden_states", "residual_input", "layer_norm"],
    ),
    "BottleneckLayer.add_fusion_layer": (bottleneck.BottleneckLayer, ["self", "adapter_names"]),
    "BottleneckLayer.compose_fuse": (bottleneck.BottleneckLayer, ["self", "adapter_setup", "state", "lvl"]),
    "LoRALinear.pad_and_concat": (lora.LoRALinear, ["self", "states"]),
    "LoRALinear.compose_average": (lora.LoRALinear, ["self", "adapter_setup", "state", "lvl"]),
    "LoRALinear.compose_multi_task": (lora.LoRALinear, ["self", "adapter_setup", "state", "lvl"]),
    "AdapterLoader.filter_func": (loading.AdapterLoader, ["self", "adapter_name"]),
    "AdapterLoader.rename_func": (loading.AdapterLoader, ["self", "old_name", "new_name"]),
    "AdapterLoader.load": (
        loading.AdapterLoader,
        ["self", "adapter_name_or_path", "config", "version", "model_name", "load_as", "loading_info", "leave_out",
         "set_active", "kwargs"],
    ),
    "AdapterFusionLoader.filter_func": (loading.AdapterFusionLoader, ["self", "adapter_fusion_name"]),
    "AdapterFusionLoader.rename_func": (loading.AdapterFusionLoader, ["self", "old_name", "new_name"]),
    "AdapterFusionLoader.load": (
        loading.AdapterFusionLoader, ["self", "save_directory", "load_as", "loading_info", "kwargs"],
    ),
    "AdapterTrainer._load_adapter_fusions": (adapters.AdapterTrainer, ["self", "resume_from_checkpoint"]),
    "AdapterTrainer._load_best_model": (adapters.AdapterTrainer, ["self"]),
}  # fmt: skip


@pytest.mark.parametrize("symbol", WRAPPED)
def test_wrapped(symbol: str) -> None:
    owner, names = WRAPPED[symbol]
    name = symbol.rpartition(".")[2]
    function = getattr(owner, name)
    assert hasattr(function, "_pal_adapters_original"), f"{symbol} is not wrapped"
    assert function.__wrapped__ is original(owner, name)
    assert not hasattr(original(owner, name), "_pal_adapters_original"), f"{symbol} is wrapped twice"
    assert parameters(original(owner, name)) == names
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    assert static is (names[0] != "self")


def test_the_table_of_the_binding_lists_them_all() -> None:
    rows = [line for line in (host.__doc__ or "").splitlines() if line.startswith("| `")]
    found, owner = set(), ""
    for row in rows:
        for symbol in re.findall(r"`([^`]+)`", row.split("|")[1]):
            owner = symbol.rpartition(".")[0] or owner
            found.add(symbol if not symbol.startswith(".") else f"{owner}{symbol}")
    assert found == {*WRAPPED, "ADAPTER_CONFIG_MAP", "ADAPTERFUSION_CONFIG_MAP"}


def test_installing_twice_wraps_once() -> None:
    before = {symbol: getattr(owner, symbol.rpartition(".")[2]) for symbol, (owner, _) in WRAPPED.items()}
    host._install()
    for symbol, (owner, _) in WRAPPED.items():
        assert getattr(owner, symbol.rpartition(".")[2]) is before[symbol]


def test_config_map() -> None:
    assert {"seq_bn", "lora", "prefix_tuning"} <= ADAPTER_CONFIG_MAP.keys()
    assert SMALL.keys() <= ADAPTER_CONFIG_MAP.keys()
    assert SMALL.keys() <= CONFIGS.keys()
    for name in SMALL:
        assert isinstance(ADAPTER_CONFIG_MAP[name], CONFIGS[name])


def test_fusion_config_map() -> None:
    fusions = adapter_fusion_config.ADAPTERFUSION_CONFIG_MAP
    assert {"static", "dynamic"} <= fusions.keys()
    for name in ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp"):
        assert isinstance(fusions[name], FUSIONS["scalearn"])
    fields = set(adapters.AdapterFusionConfig.__dataclass_fields__)
    assert fields <= set(FUSIONS["scalearn"].__dataclass_fields__)
    # From a file the host makes its own class, and keeps what it does not know.
    plain = adapters.AdapterFusionConfig.from_dict(fusions["scalearn_pp"].to_dict())
    assert type(plain) is adapters.AdapterFusionConfig
    assert (plain["architecture"], plain["variant"]) == ("scalearn", "scalearn_pp")


def test_config_classes() -> None:
    assert AdapterConfig._get_config_class({"architecture": "pal"}) is CONFIGS["pal"]
    assert AdapterConfig._get_config_class({"architecture": "lora"}) is adapters.LoRAConfig
    assert AdapterConfig._get_config_class({}) is adapters.BnConfig
    with pytest.raises(KeyError):
        AdapterConfig._get_config_class({"architecture": "no such"})
    assert parameters(AdapterConfig.from_dict) == ["config"]
    assert parameters(AdapterConfig.load)[:1] == ["config"]
    union = ConfigUnion(SMALL["pal"], adapters.LoRAConfig())
    assert union["configs"][0] is SMALL["pal"]
    assert (union.get("architecture"), adapters.SeqBnConfig().get("architecture")) == ("union", None)


def test_methods_of_a_config() -> None:
    methods = interface.AdapterMethod.get_from_config
    assert methods(SMALL["pal"]) == []
    assert methods(ConfigUnion(SMALL["pal"], adapters.LoRAConfig(), adapters.SeqBnConfig())) == ["lora", "bottleneck"]


def test_versions() -> None:
    assert Version("1.3") <= Version(adapters.__version__) < Version("1.4")


# What is called or subclassed


def test_layer_base() -> None:
    base = adapter_layer_base.AdapterLayerBase
    assert parameters(base.add_adapter) == ["self", "adapter_name", "layer_idx"]
    assert parameters(base.average_adapter) == ["self", "adapter_name", "input_adapters", "combine_strategy", "kwargs"]
    assert parameters(base.enable_adapters) == ["self", "adapter_setup", "unfreeze_adapters", "unfreeze_fusion"]
    assert parameters(base.freeze_adapter) == ["self", "adapter_name", "freeze"]
    assert parameters(base.get_active_setup) == ["self"]
    assert isinstance(base.layer_idx, property)


COMPOSE = ("compose_stack", "compose_fuse", "compose_split", "compose_batch_split", "compose_multi_task",
           "compose_parallel", "compose_average")  # fmt: skip


def test_composition_base() -> None:
    base = adapter_layer_base.ComposableAdapterLayerBase
    for name in COMPOSE:
        assert parameters(getattr(base, name)) == ["self", "adapter_setup", "state", "lvl"], name
        assert parameters(getattr(ValueComposition, name)) == ["self", "adapter_setup", "state", "lvl"], name
    assert parameters(base.compose) == ["self", "adapter_setup", "state"]
    assert parameters(base.compose_single) == ["self", "adapter_setup", "state", "lvl"]
    assert parameters(base.vslice) == ["self", "state", "slice_obj"]
    assert parameters(base.repeat) == ["self", "state", "channels"]
    assert parameters(base.pad_and_concat) == ["self", "states"]
    assert parameters(base.mean) == ["self", "states", "weights"]
    assert parameters(base.check_composition_valid) == ["self", "parent", "child", "lvl"]
    assert parameters(base._get_compose_func) == ["self", "composition_type"]
    mapping = ValueComposition.__mro__[1]._init_mapping
    assert mapping is base._init_mapping


def test_every_composition_block_is_known() -> None:
    assert set(composition.ALLOWED_NESTINGS) == set(ValueComposition.supported_compositions)


def test_contexts() -> None:
    assert {
        "task_ids",
        "output_adapter_fusion_attentions",
        "adapter_input_parallelized",
    } <= context.ForwardContext.context_args
    assert context.ForwardContext.get_context() is None
    assert context.AdapterSetup.get_context() is None
    with context.AdapterSetup("a") as setup:
        assert context.AdapterSetup.get_context() is setup
        assert setup.adapter_setup == adapters.Stack("a")
    source = inspect.getsource(model_mixin.ModelAdaptersMixin.gradient_checkpointing_enable)
    assert "ForwardContext.get_context()" in source, "checkpointing does not restore the forward context any more"


def test_bottleneck_layer() -> None:
    state = bottleneck.BottleneckState
    assert state._fields == (
        "hidden_states",
        "input_tensor",
        "adapter_residual",
        "layer_norm",
        "bottleneck_up",
        "last",
    )
    layer = bottleneck.BottleneckLayer("output_adapter", is_layer_hooked=True)
    assert (layer.location_key, layer.is_layer_hooked) == ("output_adapter", True)
    layer.init_adapters(None, ModelAdaptersConfig())
    assert isinstance(layer.adapters, nn.ModuleDict)
    assert isinstance(layer.adapter_fusion_layer, nn.ModuleDict)
    assert parameters(layer.compose_single) == ["adapter_setup", "state", "lvl"]
    assert parameters(layer._store_fusion_attentions) == ["fusion_name", "attentions"]
    for cls in (modeling.Adapter, modeling.ParallelAdapter):
        assert parameters(cls.pre_forward) == ["self", "hidden_states", "input_tensor", "layer_norm", "fusion_config"]
        assert parameters(cls.post_forward)[:2] == ["self", "hidden_states"]
    adapter = modeling.Adapter("a", 6, 2, adapters.SeqBnConfig())
    for name in ("original_ln_before", "original_ln_after", "residual_before_ln", "adapter_residual_before_ln",
                 "add_layer_norm_before", "add_layer_norm_after", "use_gating", "scaling", "dropout",
                 "non_linearity", "adapter_down", "adapter_up"):  # fmt: skip
        assert hasattr(adapter, name), name
    assert isinstance(adapter.non_linearity, modeling.Activation_Function_Class)
    assert isinstance(adapter.adapter_down[0], nn.Linear)
    assert parameters(modeling.Adapter.forward) == ["self", "x", "residual_input", "output_gating"]
    assert parameters(layer._store_gating_score) == ["adapter_name", "gating_score"]
    assert parameters(layer.get_adapter_fusion) == ["adapter_names"]
    assert parameters(ModelAdaptersConfig.common_config_value) == ["self", "adapter_names", "attribute"]
    assert parameters(modeling.BertFusion.forward) == [
        "self",
        "query",
        "key",
        "value",
        "residual",
        "output_attentions",
    ]
    fusion = modeling.BertFusion(adapters.AdapterFusionConfig.load("dynamic"), 6, 0.0)
    assert fusion.value.weight.shape == (6, 6)


def test_places_of_the_bottlenecks(bert: nn.Module) -> None:
    layer = bert.encoder.layer[0]
    assert layer.attention.output.location_key == "mh_adapter"
    assert layer.output.location_key == "output_adapter"
    assert not layer.output.is_layer_hooked


def test_lora_state() -> None:
    assert lora.LoRAState._fields == ("layer_input", "hidden_states", "layer_output", "last")


def test_model_and_its_config(bert: nn.Module) -> None:
    assert isinstance(bert.shared_parameters, nn.ModuleDict)
    config = bert.adapters_config
    for name in ("adapters", "config_map", "fusions", "active_setup", "skip_layers"):
        assert hasattr(config, name), name
    assert config.get("nothing") is None
    assert config.get_fusion("nothing") == (None, None)
    assert parameters(utils.get_adapter_config_hash)[0] == "config"
    assert [index for index, _ in bert.iter_layers()] == [0, 1, 2]
    assert issubclass(model_mixin.ModelUsingSubmodelsAdaptersMixin, model_mixin.ModelAdaptersMixin)


def test_the_loader_keeps_containers_of_our_name(bert: nn.Module) -> None:
    """`pal_adapters.<name>.` is saved and renamed by the host's own rules, see `TaskLayer`."""
    loader = loading.AdapterLoader(bert)
    keep = original(loading.AdapterLoader, "filter_func")(loader, "a")
    rename = original(loading.AdapterLoader, "rename_func")(loader, "a", "b")
    key = "encoder.layer.0.task_layer.pal_adapters.a.pal.query.weight"
    assert keep(key)
    assert not keep(key.replace(".a.", ".ab."))
    assert rename(key) == key.replace(".a.", ".b.")
    assert keep("bert.shared_parameters.a.x")
    assert not keep("shared_parameters.a.x"), "the host keeps these now: drop the wrapper's own rule"
