"""One test for each entry of `hosts/peft/expectations.py`: fails when upstream moves or starts to do our work."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import tempfile
import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import peft_types
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.integrations import PeftAdapterMixin

import pal_adapters
from pal_adapters.hosts.peft import saved as peft_saved
from pal_adapters.hosts.peft import tuner as host
from pal_adapters.hosts.peft.expectations import RELIED_ON
from pal_adapters.methods.houlsby.peft import HoulsbyModel

from . import cases

TOUCHES: dict[str, Callable[[], None]] = {}


def touch(symbol: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def remember(check: Callable[[], None]) -> Callable[[], None]:
        TOUCHES[symbol] = check
        return check

    return remember


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def lora(name: str = "bert", **changes: Any) -> PeftModel:
    return get_peft_model(cases.BUILDERS[name](), LoraConfig(**{"target_modules": ["query"], **changes})).eval()


@touch("PeftType")
def _() -> None:
    assert issubclass(PeftType, str)
    assert isinstance(PeftType, enum.EnumMeta)
    for table in ("_member_map_", "_value2member_map_"):
        assert getattr(PeftType, table)["LORA"] is PeftType.LORA
    assert "LORA" in PeftType._member_names_
    with pytest.raises(TypeError):  # still closed
        types.new_class("More", (PeftType,))


@touch("register_peft_method")
def _() -> None:
    assert parameters(peft_types.register_peft_method) == [
        "name",
        "config_cls",
        "model_cls",
        "prefix",
        "is_mixed_compatible",
    ]
    for table in ("CONFIG", "TUNER", "PREFIX", "MIXED_MODEL"):
        assert isinstance(getattr(peft.mapping, f"PEFT_TYPE_TO_{table}_MAPPING"), dict)
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig  # looked up by string too


@touch("BaseTuner._prepare_adapter_config")
def _() -> None:
    assert parameters(BaseTuner._prepare_adapter_config) == ["peft_config", "model_config"]
    source = inspect.getsource(BaseTuner.inject_adapter)
    first, second = source.index("._prepare_adapter_config("), source.index("._create_and_replace(")
    assert first < second  # everything is checked before anything changes


@touch("BaseTuner._check_target_module_exists")
def _() -> None:
    assert parameters(BaseTuner._check_target_module_exists) == ["peft_config", "key"]
    # The reason for our own matching: the host's finds no index at the end of a name.
    config = LoraConfig(target_modules=["0", "1"], layers_to_transform=[0])
    assert not tuners_utils.check_target_module_exists(config, "model.layers.0")


@touch("_ExcludedModule")
def _() -> None:
    assert not tuners_utils._ExcludedModule()
    config = LoraConfig(target_modules=["query"], exclude_modules=["query"])
    assert isinstance(tuners_utils.check_target_module_exists(config, "a.query"), tuners_utils._ExcludedModule)
    assert "isinstance(result, _ExcludedModule)" in inspect.getsource(BaseTuner.inject_adapter)


@touch("check_target_module_exists")
def _() -> None:
    config = cases.config("houlsby", target_modules=["dense"], layers_to_transform=[1])
    assert tuners_utils.check_target_module_exists(config, "encoder.layer.1.dense")
    assert not tuners_utils.check_target_module_exists(config, "encoder.layer.2.dense")


@touch("_maybe_include_all_linear_layers")
def _() -> None:
    config = cases.config("houlsby", target_modules="all-linear")
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert tuners_utils._maybe_include_all_linear_layers(config, model) is config
    assert config.target_modules == {"0"}


@touch("BaseTuner.inject_adapter")
def _() -> None:
    expected = ["model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"]
    assert parameters(BaseTuner.inject_adapter) == expected
    # The reason for our own rolling back: the host leaves what it had made.
    model = lora()
    before = len(list(model.modules()))
    real = type(model.base_model)._create_and_replace
    calls: list[int] = []

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("in the middle")
        real(self, *args, **kwargs)

    type(model.base_model)._create_and_replace = fail
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            model.add_adapter("other", LoraConfig(target_modules=["query"]))
    finally:
        type(model.base_model)._create_and_replace = real
    assert len(list(model.modules())) > before


@touch("BaseTuner._create_and_replace")
def _() -> None:
    expected = ["peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"]
    assert parameters(BaseTuner._create_and_replace) == expected == parameters(host.TaskTuner._create_and_replace)
    assert parameters(HoulsbyModel._create_and_replace) == expected


@touch("BaseTuner._mark_only_adapters_as_trainable")
def _() -> None:
    assert parameters(BaseTuner._mark_only_adapters_as_trainable) == ["model"]
    source = inspect.getsource(BaseTuner.inject_adapter)
    assert source.index("self.set_adapter(") < source.index("_mark_only_adapters_as_trainable(")


@touch("BaseTunerLayer.set_adapter")
def _() -> None:
    assert parameters(BaseTunerLayer.set_adapter) == ["adapter_names", "inference_mode"]
    assert "module.set_adapter(adapter_name)" in inspect.getsource(cases.bert().set_adapter)  # transformers' own


@touch("BaseTunerLayer.enable_adapters")
def _() -> None:
    assert parameters(BaseTunerLayer.enable_adapters) == ["enabled"]


@touch("BaseTunerLayer.set_requires_grad")
def _() -> None:
    assert parameters(BaseTunerLayer.set_requires_grad) == ["adapter_names", "requires_grad"]
    assert "module.set_requires_grad(" in inspect.getsource(peft.tuners.tuners_utils.set_requires_grad)


@touch("BaseTunerLayer.delete_adapter")
def _() -> None:
    assert parameters(BaseTunerLayer.delete_adapter) == ["adapter_name"]
    assert "target.delete_adapter(adapter_name)" in inspect.getsource(peft.tuners.tuners_utils.delete_adapter)


@touch("BaseTunerLayer._get_base_layer_device_and_dtype")
def _() -> None:
    assert parameters(BaseTunerLayer._get_base_layer_device_and_dtype) == ["base_layer"]
    assert BaseTunerLayer._get_base_layer_device_and_dtype(None, nn.Linear(1, 1)) == (
        torch.device("cpu"),
        torch.float32,
    )
    assert "_get_base_layer_device_and_dtype" in inspect.getsource(
        BaseTunerLayer._move_adapter_to_device_of_base_layer
    )


@touch("BaseTuner._get_adapter_state_dict")
def _() -> None:
    expected = ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"]
    assert parameters(BaseTuner._get_adapter_state_dict) == expected
    # The reason for putting keys back: the host loses LoRA's of block 0 to an adapter of that name.
    model = get_peft_model(cases.bert(), LoraConfig(target_modules=["query"]), "1")
    model.add_adapter("0", LoraConfig(target_modules=["query"]))
    assert not any("layer.0." in name for name in get_peft_model_state_dict(model, adapter_name="1"))


@touch("BaseTuner._remove_adapter_name_from_key")
def _() -> None:
    assert parameters(BaseTuner._remove_adapter_name_from_key) == ["key", "adapter_name"]
    assert BaseTuner._remove_adapter_name_from_key("a.lora_A.x.weight", "x") == "a.lora_A.weight"
    assert BaseTuner._remove_adapter_name_from_key("a.pal_units.x.query.weight", "x") == "a.pal_units.x.query.weight"


@touch("BaseTuner._remap_adapter_state_dict_for_load")
def _() -> None:
    expected = ["model", "config", "adapter_name", "state_dict"]
    assert parameters(BaseTuner._remap_adapter_state_dict_for_load) == expected
    assert "._remap_adapter_state_dict_for_load(" in inspect.getsource(peft.set_peft_model_state_dict)


@touch("BaseTuner.delete_adapter")
def _() -> None:
    assert parameters(BaseTuner.delete_adapter) == ["adapter_name"]
    # The reason for our own: each layer of the host chooses for itself.
    model = get_peft_model(cases.bert(), LoraConfig(target_modules=["query", "key"]), "rte")
    model.add_adapter("sst", LoraConfig(target_modules=["query"]))
    model.add_adapter("mrpc", LoraConfig(target_modules=["key"]))
    model.delete_adapter("rte")
    assert model.get_model_status().active_adapters == "irregular"


@touch("BaseTuner._check_merge_allowed")
def _() -> None:
    for function in (BaseTuner._unload_and_optionally_merge, BaseTuner.merge_adapter):
        source = inspect.getsource(function)
        assert source.index("self._check_merge_allowed()") < source.index(".merge(")


@touch("BaseTuner._unload_and_optionally_merge")
def _() -> None:
    assert parameters(BaseTuner._unload_and_optionally_merge) == [
        "merge",
        "progressbar",
        "safe_merge",
        "adapter_names",
    ]
    assert "_unload_and_optionally_merge(merge=False)" in inspect.getsource(BaseTuner.unload)


@touch("PeftModel._enable_peft_forward_hooks")
def _() -> None:
    assert not hasattr(BaseTuner, "_enable_peft_forward_hooks")  # each tuner's own
    source = inspect.getsource(PeftModel._enable_peft_forward_hooks)
    assert "self.base_model._enable_peft_forward_hooks(*args, **kwargs)" in source
    model = lora()
    with pytest.raises(ValueError, match="training mode"):  # ours works there
        model.train()(**cases.inputs(), adapter_names=["default"] * 4)
    assert "adapter_names" in model.special_peft_forward_args


@touch("ModulesToSaveWrapper.forward")
def _() -> None:
    assert issubclass(ModulesToSaveWrapper, AuxiliaryTrainingWrapper)
    wrapper = ModulesToSaveWrapper(nn.Sequential(nn.Linear(2, 2)), "a")
    assert list(wrapper.modules_to_save) == ["a"]
    assert isinstance(wrapper.original_module, nn.Sequential)
    with pytest.raises(TypeError, match="Mixed batching is only supported"):
        wrapper(torch.ones(2, 2), adapter_names=["a", "__base__"])
    linear = ModulesToSaveWrapper(nn.Linear(2, 2), "a")
    with pytest.raises(ValueError, match="Length of `adapter_names`"):  # beams repeat rows
        linear(torch.ones(4, 2), adapter_names=["a", "__base__"])


@touch("PeftModel.forward")
def _() -> None:
    for name in ("SequenceClassification", "TokenClassification", "CausalLM", "Seq2SeqLM", "QuestionAnswering"):
        assert "task_ids" in parameters(getattr(peft, f"PeftModelFor{name}").forward)
    lora(task_type="SEQ_CLS")(**cases.inputs(), task_ids=torch.tensor([0]))  # dropped in silence
    hooks = cases.peft_model("lhuc")._forward_pre_hooks.values()
    assert list(hooks) == [host._refuse_task_ids]


@touch("PeftModel.__init__ (special_peft_forward_args)")
def _() -> None:
    assert cases.peft_model("lhuc").special_peft_forward_args == {"adapter_names", "alora_offsets"}
    network = get_peft_model(cases.bert(), pal_adapters.CAMTLPeftConfig(tasks=2))
    assert network.special_peft_forward_args > {"adapter_names", "task_ids"}
    seen: list[dict[str, Any]] = []
    network.base_model.model.forward = lambda **kwargs: seen.append(kwargs)
    network(input_ids=torch.zeros(1, 2), task_ids=[0])
    assert "task_ids" not in seen[0]


@touch("register_module_module_registration_hook")
def _() -> None:
    from torch.nn.modules import module

    assert not module._global_module_registration_hooks
    seen: list[tuple[nn.Module, str, nn.Module]] = []
    handle = module.register_module_module_registration_hook(lambda *event: seen.append(event))
    holder, child = nn.Module(), nn.Linear(1, 1)
    holder.child = child
    handle.remove()
    assert seen == [(holder, "child", child)]
    # A tuner that no model ever holds leaves no hook behind either.
    tuner = PEFT_TYPE_TO_TUNER_MAPPING["LHUC"](cases.bert(), {"x": cases.config("lhuc")}, "x")
    assert len(module._global_module_registration_hooks) == 1
    del tuner
    import gc

    gc.collect()
    nn.Sequential(nn.ReLU())
    assert not module._global_module_registration_hooks


@touch("PreTrainedModel._set_gradient_checkpointing (_gradient_checkpointing_func)")
def _() -> None:
    model = cases.llama()
    enable = model.activation_checkpointing_enable if cases.TRANSFORMERS_5 else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    blocks = model.model.layers
    assert all(block.gradient_checkpointing for block in blocks)
    calls: list[int] = []
    for block in blocks:
        function = vars(block)["_gradient_checkpointing_func"]

        def count(inner: Any, *args: Any, _function: Any = function, **kwargs: Any) -> Any:
            calls.append(1)
            return _function(inner, *args, **kwargs)

        block._gradient_checkpointing_func = count
    model.train()(**cases.inputs("llama"))
    assert len(calls) == len(blocks)


@touch("load_peft_weights")
def _() -> None:
    assert parameters(peft_saved.load_peft_weights) == ["model_id", "device", "key_mapping", "hf_hub_download_kwargs"]
    with tempfile.TemporaryDirectory() as folder:
        lora().save_pretrained(folder)
        config, tensors, commit = peft_saved.read_adapter(cases.bert(), folder)
    assert isinstance(config, LoraConfig)
    assert commit is None
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight" in tensors


@touch("get_peft_model_state_dict")
def _() -> None:
    model = lora()
    found = peft_saved.adapter_on(model.get_base_model(), "default")
    assert found is not None
    assert "bert.encoder.layer.0.attention.self.query.lora_A.weight" in found[1]
    assert peft_saved.adapter_on(model.get_base_model(), "other") is None
    assert peft_saved.adapter_on(cases.bert(), "default") is None


@touch("get_pattern_key")
def _() -> None:
    settings = {"r": 4, "lora_alpha": 6, "alpha_pattern": {r"layer\.1\..*query": 5}, "rank_pattern": {"query": 2}}
    for rslora in (False, True):
        model = lora(use_rslora=rslora, **settings)
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                assert module.scaling["default"] == peft_saved.lora_scaling(model.peft_config["default"], name, 2)


@touch("LoraConfig")
def _() -> None:
    assert not peft_saved.lora_extras(LoraConfig(use_rslora=True, lora_bias=True))
    for extra in ({"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"target_parameters": ["a"]}):
        assert len(peft_saved.lora_extras(LoraConfig(**extra))) == 1, extra
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    assert {"target_parameters", "layer_replication", "trainable_token_indices", "alpha_pattern"} <= known


@touch("PeftModel.__init__")
def _() -> None:
    for cls in {PeftModel, *peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        if "__init__" in vars(cls):
            assert parameters(cls.__init__)[:3] == ["model", "peft_config", "adapter_name"]
    # The reason for putting things back: the host adds the adapter before it finds the model unfit.
    model = cases.bert().bert
    with pytest.raises(AttributeError):
        get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_2_SEQ_LM"))
    assert any(isinstance(module, LoraLayer) for module in model.modules())


@touch("PeftModel.add_adapter")
def _() -> None:
    for cls in {PeftModel, *peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        assert parameters(cls.add_adapter)[:2] == ["adapter_name", "peft_config"]


@touch("PeftModel.load_adapter")
def _() -> None:
    assert parameters(PeftModel.load_adapter)[:2] == ["model_id", "adapter_name"]
    source = inspect.getsource(PeftModel.load_adapter)
    assert source.index("self.add_adapter(") < source.index("load_peft_weights(")  # the reason for putting things back


@touch("PeftModel.from_pretrained")
def _() -> None:
    assert parameters(PeftModel.from_pretrained)[:2] == ["model", "model_id"]
    assert not any("from_pretrained" in vars(cls) for cls in peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())


@touch("PeftModel.save_pretrained")
def _() -> None:
    source = inspect.getsource(PeftModel.save_pretrained)
    assert source.count("get_peft_model_state_dict(") == 1  # where base weights are put into their own file
    assert 'os.path.join(save_directory, adapter_name) if adapter_name != "default" else save_directory' in source


@touch("PeftModel.set_adapter")
def _() -> None:
    assert parameters(PeftModel.set_adapter) == ["adapter_name", "inference_mode"]


@touch("PeftModel.delete_adapter")
def _() -> None:
    assert parameters(PeftModel.delete_adapter) == ["adapter_name"]


@touch("PeftConfigMixin.from_pretrained")
def _() -> None:
    assert "from_pretrained" not in vars(peft.PeftConfig)
    # It makes a config of the method's class without calling that class's own `from_pretrained`.
    assert "from_peft_type" in inspect.getsource(inspect.unwrap(PeftConfigMixin.from_pretrained.__func__))


@touch("PeftModel.disable_adapter")
def _() -> None:
    # The reason for the check in front: an error inside turns layers on, and what they hold trainable.
    assert "finally" in inspect.getsource(PeftModel.disable_adapter)


@touch("PeftAdapterMixin.add_adapter")
def _() -> None:
    assert parameters(PeftAdapterMixin.add_adapter) == ["adapter_config", "adapter_name"]


@touch("PeftAdapterMixin.load_adapter")
def _() -> None:
    assert parameters(PeftAdapterMixin.load_adapter)[:2] == ["peft_model_id", "adapter_name"]
    assert "inject_adapter_in_model(peft_config, self, adapter_name" in inspect.getsource(
        PeftAdapterMixin.load_adapter
    )
    if cases.TRANSFORMERS_5:
        from transformers.modeling_utils import LoadStateDictInfo

        fields = {field.name for field in dataclasses.fields(LoadStateDictInfo)}
        assert fields >= {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}


@touch("PeftAdapterMixin.delete_adapter")
def _() -> None:
    assert parameters(PeftAdapterMixin.delete_adapter) == ["adapter_names"]


@touch("PeftAdapterMixin.disable_adapters")
def _() -> None:
    assert parameters(PeftAdapterMixin.disable_adapters) == []


@touch("PeftModel.create_or_update_model_card")
def _() -> None:
    assert "self.create_or_update_model_card(save_directory)" in inspect.getsource(PeftModel.save_pretrained)


def test_every_touch_has_a_test() -> None:
    assert [touch.symbol for touch in RELIED_ON] == list(TOUCHES)


@pytest.mark.parametrize("symbol", list(TOUCHES))
def test_touch(symbol: str) -> None:
    TOUCHES[symbol]()
