"""What the package replaces or relies on in `adapters`: upstream changes are named here and on import."""

from __future__ import annotations

import inspect
from typing import Any

import adapters
import pytest
from adapters import composition, context, interface, loading, model_mixin
from adapters.configuration import (
    ADAPTER_CONFIG_MAP,
    AdapterConfig,
    ConfigUnion,
    ModelAdaptersConfig,
    adapter_fusion_config,
)
from adapters.methods import adapter_layer_base, bottleneck, modeling
from torch import nn

from pal_adapters.errors import MissingHostError
from pal_adapters.hosts.adapters import patches
from pal_adapters.hosts.adapters.composition import ValueComposition
from pal_adapters.hosts.adapters.config import CONFIGS
from pal_adapters.hosts.adapters.expectations import RELIED_ON
from pal_adapters.hosts.adapters.fusion import FUSIONS, HOST_ONLY, PRESETS
from pal_adapters.hosts.adapters.patches import REPLACED, Replaced
from pal_adapters.hosts.expectations import Touch

from .tiny import SMALL


def original(owner: Any, name: str) -> Any:
    """The host's own function inside the wrapper."""
    return getattr(owner, name)._pal_adapters_original


@pytest.mark.parametrize("replaced", REPLACED, ids=lambda r: r.expected().symbol)
def test_replaced(replaced: Replaced) -> None:
    owner, name = replaced.owner, replaced.name
    function = getattr(owner, name)
    assert function.__wrapped__ is original(owner, name)
    assert not hasattr(original(owner, name), "_pal_adapters_original"), "replaced twice"
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    assert static is (replaced.arguments[0] != "self")
    assert replaced.reason


def test_the_table_lists_every_replaced_symbol() -> None:
    found = set()
    for owner in [*(r.owner for r in REPLACED), *vars(adapters).values()]:
        if inspect.isclass(owner):
            functions = {name: getattr(value, "__func__", value) for name, value in vars(owner).items()}
            found |= {(owner, name) for name, f in functions.items() if hasattr(f, "_pal_adapters_original")}
    assert found == {(r.owner, r.name) for r in REPLACED}


@pytest.mark.parametrize("expected", RELIED_ON, ids=lambda t: t.symbol)
def test_relied_on(expected: Touch) -> None:
    assert expected.fault() is None
    assert expected.reason


def test_installing_twice_replaces_once() -> None:
    before = [getattr(r.owner, r.name) for r in REPLACED]
    patches.install.cache_clear()
    patches.install()
    assert [getattr(r.owner, r.name) for r in REPLACED] == before


def test_a_host_that_has_moved_is_rejected_before_anything_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [getattr(r.owner, r.name) for r in REPLACED]
    gone = Touch("adapters:AdapterConfig.gone", None, "x")
    monkeypatch.setattr(patches, "RELIED_ON", (*RELIED_ON, gone))
    patches.install.cache_clear()
    with pytest.raises(MissingHostError, match=r"adapters .*: AdapterConfig\.gone does not exist \(needed: x\)"):
        patches.install()
    assert [getattr(r.owner, r.name) for r in REPLACED] == before


def test_config_map() -> None:
    assert {"seq_bn", "lora", "prefix_tuning"} <= ADAPTER_CONFIG_MAP.keys()
    assert SMALL.keys() <= ADAPTER_CONFIG_MAP.keys()
    assert SMALL.keys() <= CONFIGS.keys()
    for name in SMALL:
        assert isinstance(ADAPTER_CONFIG_MAP[name], CONFIGS[name])


def test_fusion_config_map() -> None:
    table = adapter_fusion_config.ADAPTERFUSION_CONFIG_MAP
    assert set(table) == {"static", "dynamic"}  # the host builds fusions of its own kind from what is there
    fusions = PRESETS
    for name in ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp"):
        assert isinstance(fusions[name], FUSIONS["scalearn"])
    fields = set(adapters.AdapterFusionConfig.__dataclass_fields__)
    assert fields <= set(FUSIONS["scalearn"].__dataclass_fields__)
    # Without its own options, the host cannot make a fusion of its own kind.
    saved = fusions["scalearn_pp"].to_dict()
    assert not saved.keys() & set(HOST_ONLY)
    with pytest.raises(TypeError, match="missing 9 required positional arguments"):
        adapters.AdapterFusionConfig.from_dict(saved)
    assert FUSIONS["scalearn"].from_dict(saved) == fusions["scalearn_pp"]


def test_config_classes() -> None:
    assert AdapterConfig._get_config_class({"architecture": "pal"}) is CONFIGS["pal"]
    assert AdapterConfig._get_config_class({"architecture": "lora"}) is adapters.LoRAConfig
    assert AdapterConfig._get_config_class({}) is adapters.BnConfig
    with pytest.raises(KeyError):
        AdapterConfig._get_config_class({"architecture": "no such"})
    union = ConfigUnion(SMALL["pal"], adapters.LoRAConfig())
    assert union["configs"][0] is SMALL["pal"]
    assert (union.get("architecture"), adapters.SeqBnConfig().get("architecture")) == ("union", None)


def test_methods_of_a_config() -> None:
    methods = interface.AdapterMethod.get_from_config
    assert methods(SMALL["pal"]) == []
    assert methods(ConfigUnion(SMALL["pal"], adapters.LoRAConfig(), adapters.SeqBnConfig())) == ["lora", "bottleneck"]


# What is called or subclassed, as far as a signature does not say it


def test_layer_base() -> None:
    assert isinstance(adapter_layer_base.AdapterLayerBase.layer_idx, property)
    base = adapter_layer_base.ComposableAdapterLayerBase
    assert ValueComposition.__mro__[1]._init_mapping is base._init_mapping
    for one in RELIED_ON:
        if one.symbol.startswith("ComposableAdapterLayerBase.compose_"):
            ours = getattr(ValueComposition, one.symbol.rpartition(".")[2])
            assert tuple(inspect.signature(ours).parameters) == one.names


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
    layer = bottleneck.BottleneckLayer("output_adapter", is_layer_hooked=True)
    assert (layer.location_key, layer.is_layer_hooked) == ("output_adapter", True)
    layer.init_adapters(None, ModelAdaptersConfig())
    assert isinstance(layer.adapters, nn.ModuleDict)
    assert isinstance(layer.adapter_fusion_layer, nn.ModuleDict)
    adapter = modeling.Adapter("a", 6, 2, adapters.SeqBnConfig())
    for name in ("original_ln_before", "original_ln_after", "residual_before_ln", "adapter_residual_before_ln",
                 "add_layer_norm_before", "add_layer_norm_after", "use_gating", "scaling", "dropout",
                 "non_linearity", "adapter_down", "adapter_up"):  # fmt: skip
        assert hasattr(adapter, name), name
    assert isinstance(adapter.non_linearity, modeling.Activation_Function_Class)
    assert isinstance(adapter.adapter_down[0], nn.Linear)
    fusion = modeling.BertFusion(adapters.AdapterFusionConfig.load("dynamic"), 6, 0.0)
    assert fusion.value.weight.shape == (6, 6)


def test_places_of_the_bottlenecks(bert: nn.Module) -> None:
    layer = bert.encoder.layer[0]
    assert layer.attention.output.location_key == "mh_adapter"
    assert layer.output.location_key == "output_adapter"
    assert not layer.output.is_layer_hooked


def test_model_and_its_config(bert: nn.Module) -> None:
    assert isinstance(bert.shared_parameters, nn.ModuleDict)
    config = bert.adapters_config
    for name in ("adapters", "config_map", "fusions", "active_setup", "skip_layers"):
        assert hasattr(config, name), name
    assert config.get("nothing") is None
    assert config.get_fusion("nothing") == (None, None)
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
