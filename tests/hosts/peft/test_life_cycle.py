"""Adding, choosing, disabling, deleting, unloading and copying adapters, and what the host reports about them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

import pal_adapters as pa
from pal_adapters.methods.shared import pal_parameters
from tests.methods import RECORDS

from . import cases


def layers(model: Any) -> list[BaseTunerLayer]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def test_an_adapter_computes_the_same_alone_and_beside_others(method: str) -> None:
    given = cases.inputs()
    together = cases.peft_model(method, adapters=("rte", "sst", "mrpc"))
    plain = cases.run(cases.bert(), None, given)
    for name in ("sst", "rte", "mrpc", "sst"):
        alone = cases.peft_model(method, adapters=("default",), randomised=False)
        set_peft_model_state_dict(alone, get_peft_model_state_dict(together, adapter_name=name))
        assert torch.equal(cases.run(together, name, given), cases.run(alone, "default", given))
        assert together.active_adapters == [name]
        assert torch.equal(cases.run(together, None, given), plain)


def test_added_adapters_start_frozen_and_leave_the_others_alone(method: str) -> None:
    model = cases.peft_model(method)
    given = cases.inputs()
    before = cases.run(model, "rte", given)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("sst", cases.config(method, task_type="SEQ_CLS"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert trained == {n for n, _ in cases.adapter_parameters(model, "rte")}
    with torch.no_grad():
        assert torch.equal(model(**given).logits, before)
    assert model.active_adapters == ["rte"]
    model.set_adapter("sst")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in cases.adapter_parameters(model, "sst")
    }
    model.set_adapter("rte", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("sst")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in cases.adapter_parameters(model, "sst")
    }


def test_adding_a_name_twice_is_refused(method: str) -> None:
    model = cases.peft_model(method)
    before = cases.state(model)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("rte", cases.config(method, task_type="SEQ_CLS"))
    cases.assert_same_state(model, before)


def test_delete(method: str) -> None:
    model = cases.peft_model(method, adapters=("rte", "sst", "mrpc"))
    given = cases.inputs()
    expected = {name: cases.run(model, name, given) for name in ("rte", "sst", "mrpc")}
    model.set_adapter("sst")
    model.delete_adapter("mrpc")  # not active
    assert model.active_adapters == ["sst"]
    assert not any("mrpc" in name for name in model.state_dict())
    model.delete_adapter("sst")  # active: the host takes the first of those that are left
    assert model.active_adapters == ["rte"]
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected["rte"])
    assert list(model.peft_config) == ["rte"]
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("sst")
    model.base_model.delete_adapter("rte")
    base = model.base_model.model
    assert layers(base) == []
    assert not any("rte" in name or method in name for name in base.state_dict())
    assert not any("rte" in name for name, _ in base.named_modules())


def test_delete_with_other_blocks_leaves_one_active_adapter() -> None:
    """PEFT asks each layer separately, which would activate `sst` in one block and `mrpc` in the other."""
    model = get_peft_model(cases.bert(), cases.config("pal"), "rte")
    model.add_adapter("sst", cases.config("pal", layers_to_transform=0))
    model.add_adapter("mrpc", cases.config("pal", layers_to_transform=1))
    model.delete_adapter("rte")
    assert model.active_adapters == ["mrpc"] or model.active_adapters == ["sst"]
    assert model.get_model_status().active_adapters == model.active_adapters
    assert len(layers(model)) == 2
    model.delete_adapter(model.active_adapters[0])
    assert model.active_adapters == list(model.peft_config)
    assert model.get_model_status().active_adapters == model.active_adapters


def test_delete_where_the_first_layer_has_no_other_adapter() -> None:
    model = get_peft_model(cases.bert(), cases.config("low_rank", layers_to_transform=0), "rte")
    model.add_adapter("sst", cases.config("low_rank", layers_to_transform=2))
    cases.randomise(model, "sst", seed=0)
    given = cases.inputs()
    expected = cases.run(model, "sst", given)
    model.set_adapter("rte")
    model.delete_adapter("rte")
    assert model.active_adapters == ["sst"]
    with torch.no_grad():
        assert torch.equal(model.eval()(**given).logits, expected)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_unload_gives_the_base_model_back(method: str, name: str) -> None:
    base = cases.BUILDERS[name]()
    before, before_hooks, given = cases.state(base), cases.hooks(base), cases.inputs(name)
    attributes = {n: set(vars(m)) for n, m in base.named_modules()}
    plain = cases.run(base, None, given)
    task_type = cases.TASK_TYPES[name]
    model = get_peft_model(base, cases.config(method, task_type=task_type), "rte")
    model.add_adapter("sst", cases.config(method, task_type=task_type, init_weights=False))
    cases.run(model.eval(), "sst", given)
    unloaded = model.unload()
    assert unloaded is base
    cases.assert_same_state(unloaded, before)
    assert cases.hooks(unloaded) == before_hooks
    # The host's own trace: the method that its `PeftModel` replaced for generation.
    assert {n: set(vars(m)) for n, m in base.named_modules()} == attributes
    assert torch.equal(cases.run(unloaded, None, given), plain)
    assert torch.equal(cases.run(get_peft_model(base, cases.config("lhuc")).eval(), "default", given), plain)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_copies_are_independent(method: str, name: str) -> None:
    # No head: the host's `unload` leaves the head of the active adapter in the model.
    model = cases.peft_model(method, name, adapters=("rte", "sst"), task_type=None)
    given = cases.inputs(name)
    expected = {n: cases.run(model, n, given) for n in ("rte", "sst")}
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for twin in copies:
        for n in ("rte", "sst"):
            assert torch.equal(cases.run(twin, n, given), expected[n])
        cases.randomise(twin, "rte", seed=9)
        assert not torch.equal(cases.run(twin, "rte", given), expected["rte"])
        assert torch.equal(cases.run(model, "rte", given), expected["rte"])
        before = cases.hooks(model)
        base = twin.unload()
        assert not any(sum(counts) for counts in cases.hooks(base).values())
        assert torch.equal(cases.run(base, None, given), cases.run(model, None, given))
        assert cases.hooks(model) == before


def test_shared_projections_count_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(cases.bert(), cases.config("pal"))
    trained, total = model.get_nb_trainable_parameters()
    assert trained == pal_parameters(24, 12, 3)
    assert total == trained + sum(p.numel() for p in cases.bert().parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,d} || all params: {total:,d}" in capsys.readouterr().out
    untied = get_peft_model(cases.bert(), cases.config("pal", tie_projections=False))
    assert untied.get_nb_trainable_parameters()[0] == 3 * pal_parameters(24, 12, 1)


def test_status(method: str) -> None:
    model = cases.peft_model(method, adapters=("rte", "sst"))
    status = model.get_model_status()
    assert status.base_model_type == "BertForSequenceClassification"
    assert status.peft_types == {"rte": method.upper(), "sst": method.upper()}
    assert status.enabled is True
    assert status.active_adapters == ["rte"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"rte": True, "sst": False}
    assert status.available_adapters == ["rte", "sst"]
    assert status.devices == {"rte": ["cpu"], "sst": ["cpu"]}
    assert status.trainable_params == sum(p.numel() for _, p in cases.adapter_parameters(model, "rte"))
    per_layer = model.get_layer_status()
    ours = [s for s in per_layer if s.module_type != "ModulesToSaveWrapper"]
    assert len(ours) == RECORDS[method].parts(3)
    assert all(s.module_type.startswith(f"{method}.") for s in ours)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True


def test_widths_are_exposed(method: str) -> None:
    model = cases.peft_model(method)
    for layer in layers(model):
        assert (layer.in_features, layer.out_features) == (24, 24)
        assert layer.merged_adapters == []
        assert not layer.merged
        assert isinstance(layer.get_base_layer(), torch.nn.Module)


def test_inject_without_a_peft_model(method: str) -> None:
    given = cases.inputs()
    model = cases.peft_model(method, randomised=True)
    config = cases.config(method, task_type="SEQ_CLS", modules_to_save=["classifier"])
    injected = inject_adapter_in_model(config, cases.bert(), "x")
    saved = get_peft_model_state_dict(model, adapter_name="rte")
    saved = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    assert not set_peft_model_state_dict(injected, saved, "x").unexpected_keys
    assert torch.equal(cases.run(injected.eval(), None, given), cases.run(model, "rte", given))
    again = get_peft_model_state_dict(injected, adapter_name="x")
    assert set(again) == set(saved)
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_modules_to_save(method: str) -> None:
    """A head of one's own and one that the task type adds, each trained and saved with its adapter."""
    changes = {"task_type": None, "modules_to_save": ["classifier", "bert.pooler"]}
    model = cases.peft_model(method, adapters=("rte", "sst"), **changes)
    given = cases.inputs()
    assert model.modules_to_save == {"classifier", "bert.pooler"}
    outputs = {}
    for name in ("rte", "sst"):
        saved = get_peft_model_state_dict(model, adapter_name=name)
        assert {"base_model.model.classifier.weight", "base_model.model.bert.pooler.dense.bias"} <= set(saved)
        outputs[name] = cases.run(model, name, given)
        plain = cases.bert()
        plain.classifier.load_state_dict({k.rpartition(".")[2]: v for k, v in saved.items() if ".classifier." in k})
        plain.bert.pooler.dense.load_state_dict({k.rpartition(".")[2]: v for k, v in saved.items() if ".pooler." in k})
        without = get_peft_model(plain, cases.config(method, task_type=None)).eval()
        modules = {k: v for k, v in saved.items() if ".classifier." not in k and ".pooler." not in k}
        set_peft_model_state_dict(without, modules)
        assert torch.equal(cases.run(without, "default", given), outputs[name])
    assert not torch.equal(outputs["rte"], outputs["sst"])


def test_two_active_adapters_with_one_head_are_refused_by_the_host(method: str) -> None:
    model = cases.peft_model(method, adapters=("rte", "sst"))
    with pytest.raises(ValueError, match="Only one adapter can be set"):
        model.base_model.set_adapter(["rte", "sst"])


def test_unload_keeps_what_a_joint_adapter_trained() -> None:
    model = cases.peft_model("lhuc", train_base=True, randomised=False)
    weight = model.base_model.model.bert.pooler.dense.weight
    weight.data.add_(1.0)
    expected = weight.detach().clone()
    assert torch.equal(model.unload().bert.pooler.dense.weight, expected)


def test_config_is_public() -> None:
    for name, (config_class, _) in cases.METHODS.items():
        if config_class.__module__.startswith("pal_adapters."):
            assert getattr(pa, config_class.__name__) is config_class, name
