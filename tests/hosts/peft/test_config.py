"""Configs: round trips through JSON, and how wrong values are rejected."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import pal_adapters as pa
from pal_adapters import ConfigError, UnsupportedError
from pal_adapters.hosts.peft import tuner as host
from pal_adapters.methods.houlsby.peft import HOULSBY, HoulsbyModel
from tests.methods import RECORDS

from . import cases

CHANGES = {name: dict(RECORDS[name].changes) for name in cases.METHODS}
COMMON = {"target_modules": ["layer.2", "layer.1"], "exclude_modules": ["layer.0"], "modules_to_save": ["pooler"],
          "task_type": "TOKEN_CLS"}  # fmt: skip


def test_json_and_back(method: str, tmp_path: pathlib.Path) -> None:
    config_class = cases.METHODS[method][0]
    config = cases.config(method, **CHANGES[method], **COMMON)
    assert config.target_modules == {"layer.1", "layer.2"}
    assert config.exclude_modules == {"layer.0"}
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == method.upper()
    assert all(stored[name] == value for name, value in CHANGES[method].items())
    for loaded in (PeftConfig.from_pretrained(tmp_path), config_class.from_pretrained(tmp_path),
                   get_peft_config(stored), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):  # fmt: skip
        assert type(loaded) is config_class
        assert asdict(loaded) == asdict(config)
        assert loaded.peft_type is getattr(PeftType, method.upper())
    given = cases.inputs()
    torch.manual_seed(3)
    first = get_peft_model(cases.bert(), cases.config(method, **CHANGES[method])).eval()
    cases.config(method, **CHANGES[method]).save_pretrained(tmp_path / "two")
    second = get_peft_model(cases.bert(), PeftConfig.from_pretrained(tmp_path / "two")).eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(cases.run(first, "default", given), cases.run(second, "default", given))


def test_unknown_fields_of_later_versions_are_dropped_with_a_warning(method: str, tmp_path: pathlib.Path) -> None:
    cases.config(method).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert type(PeftConfig.from_pretrained(tmp_path)) is cases.METHODS[method][0]


def test_registration(method: str) -> None:
    config_class = cases.METHODS[method][0]
    member = PeftType(method.upper())
    assert member in list(PeftType)
    assert member.value == member.name == method.upper()
    assert member == method.upper()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is config_class
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == f"{method}_" == PEFT_TYPE_TO_TUNER_MAPPING[member].prefix
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert not PEFT_TYPE_TO_TUNER_MAPPING[member].uses_shared_state  # else transformers could not inject it


def test_registration_is_idempotent_and_owns_no_other_name() -> None:
    before = list(PeftType)
    host.register(HOULSBY, pa.HoulsbyPeftConfig, HoulsbyModel)
    assert list(PeftType) == before
    with pytest.raises(ConfigError, match="PEFT already has a method named 'HOULSBY'"):
        host.register(HOULSBY, pa.PALPeftConfig, HoulsbyModel)
    import dataclasses

    with pytest.raises(ConfigError, match="PEFT already has a method named 'LORA'"):
        host.register(dataclasses.replace(HOULSBY, name="lora"), pa.HoulsbyPeftConfig, HoulsbyModel)


WRONG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("pal", {"num_heads": 0}, ("num_heads=0", "at least 1")),
    ("pal", {"hidden_size": 13}, ("hidden_size=13", "num_heads=3", "12 or 15")),
    ("pal", {"dropout": 1.0}, ("dropout=1.0", "0 <= p < 1")),
    ("pal", {"activation_site": "start"}, ("activation_site='start'", "'output', 'middle', 'none'")),
    ("pal", {"pal_input": "h"}, ("pal_input='h'", "'norm', 'raw'")),
    ("pal", {"tie_projections": 1}, ("tie_projections=1", "True or False")),
    ("low_rank", {"hidden_size": 2.5}, ("hidden_size=2.5", "an integer")),
    ("low_rank", {"lhuc": "yes"}, ("lhuc='yes'", "True or False")),
    ("top_attention", {"num_layers": 0}, ("num_layers=0", "at least 1")),
    ("top_bert_layer", {"intermediate_size": -1}, ("intermediate_size=-1", "at least 1")),
    ("lhuc", {"lhuc_site": "input"}, ("lhuc_site='input'", "'auto', 'output', 'ffn'")),
    ("parallel_houlsby", {"hidden_size": True}, ("hidden_size=True", "an integer")),
    ("parallel_houlsby", {"lhuc": True}, ("lhuc=True", "not supported")),
    ("houlsby_pal", {"bottleneck_size": 0}, ("bottleneck_size=0", "at least 1")),
    ("houlsby_pal", {"lhuc": True}, ("lhuc=True", "not supported")),
    ("houlsby", {"activation": "swish"}, ("activation='swish'", "'gelu_new', 'gelu', 'relu', 'silu', 'tanh'")),
    ("houlsby", {"init_std": 0.0}, ("init_std=0.0", "positive")),
    ("houlsby", {"train_layernorm": None}, ("train_layernorm=None", "True or False")),
]
EVERYWHERE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"init_weights": "zero"}, ("init_weights='zero'", "True or False")),
    ({"train_base": "joint"}, ("train_base='joint'", "True or False")),
    ({"target_modules": 3}, ("target_modules=3", "a list of names")),
    ({"target_modules": [1]}, ("target_modules=", "a list of names")),
    ({"exclude_modules": [None]}, ("exclude_modules=", "a list of names")),
    ({"layers_pattern": "layer"}, ("layers_pattern='layer'", "layers_to_transform")),
    ({"layers_pattern": 4, "layers_to_transform": [0]}, ("layers_pattern=4", "a list of names")),
    ({"layers_to_transform": [0], "target_modules": ".*"}, ("layers_to_transform=[0]", "target_modules='.*'")),
    ({"modules_to_save": "classifier"}, ("modules_to_save='classifier'", "a list")),
    ({"sites": {"norm": "pre"}}, ("sites=", "'block'")),
    ({"sites": {"block": "X", "norm": "middle"}}, ("sites=",)),
]
CASES = WRONG + [(m, changes, parts) for m in cases.METHODS for changes, parts in EVERYWHERE]


@pytest.mark.parametrize(
    ("method", "changes", "parts"), CASES, ids=[f"{m}-{next(iter(c))}-{i}" for i, (m, c, _) in enumerate(CASES)]
)
def test_wrong_values(method: str, changes: dict[str, Any], parts: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    expected = UnsupportedError if "lhuc" in changes and changes["lhuc"] is True else ConfigError
    ways: list[Any] = [lambda: cases.METHODS[method][0](**{**cases.METHODS[method][1], **changes})]
    stored = json.loads(json.dumps({**asdict(cases.config(method)), **changes}, default=list))
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    ways += [lambda: get_peft_config(stored), lambda: PeftConfig.from_pretrained(tmp_path)]
    for way in ways:
        with pytest.raises(expected) as caught:
            way()
        assert isinstance(caught.value, ValueError)
        assert all(part in str(caught.value) for part in parts), str(caught.value)


BERT_SITES = {
    "block": "BertLayer",
    "norm": "post",
    "attention": "attention",
    "attention_output": "attention.output.dropout",
    "ffn": "intermediate",
    "ffn_output": "output.dropout",
    "output": "output",
}
UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("pal", {"pal_input": "raw"}, "pal_input='raw' has no effect on this model"),
    ("low_rank", {"pal_input": "raw"}, "pal_input='raw' has no effect on this model"),
    ("top_bert_layer", {"num_heads": 7}, "hidden_size=24 is not allowed with num_heads=7"),
    *(
        (method, {"sites": {**BERT_SITES, "ffn": "nowhere"}}, "BertLayer has no module 'nowhere'")
        for method in cases.METHODS
    ),
    *((method, {"sites": {**BERT_SITES, "block": "Other"}}, "no block of class 'Other'") for method in cases.METHODS),
]


@pytest.mark.parametrize(("method", "changes", "message"), UNFIT)
def test_values_that_do_not_fit_the_model(method: str, changes: dict[str, Any], message: str) -> None:
    """Found when the adapter is added: the model is as it was."""
    base = cases.bert()
    before, hooks = cases.state(base), cases.hooks(base)
    with pytest.raises(pa.PalAdaptersError, match=message):
        get_peft_model(base, cases.config(method, **changes))
    cases.assert_same_state(base, before)
    assert cases.hooks(base) == hooks
    assert all(p.requires_grad for p in base.parameters())


def test_an_error_in_the_middle_is_rolled_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If creating the layers fails, none of them stays."""
    model = cases.peft_model(method)
    given = cases.inputs()
    expected, before, hooks = cases.run(model, "rte", given), cases.state(model), cases.hooks(model)
    trained = [p.requires_grad for p in model.parameters()]
    layer_class = type(next(m for m in model.modules() if hasattr(m, "adapter_layer_names") and hasattr(m, "place")))
    place, calls = layer_class.place, []

    def fail_late(self: Any, *args: Any, **kwargs: Any) -> None:
        place(self, *args, **kwargs)
        calls.append(self)
        if len(calls) == (1 if RECORDS[method].at_top else 2):
            raise RuntimeError("in the middle")

    monkeypatch.setattr(layer_class, "place", fail_late)
    with pytest.raises(RuntimeError, match="in the middle"):
        model.add_adapter("sst", cases.config(method, task_type="SEQ_CLS"))
    cases.assert_same_state(model, before)
    assert cases.hooks(model) == hooks
    assert list(model.peft_config) == ["rte"]
    assert [p.requires_grad for p in model.parameters()] == trained
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)
    base, calls[:] = cases.bert(), []
    before, hooks = cases.state(base), cases.hooks(base)
    with pytest.raises(RuntimeError, match="in the middle"):
        get_peft_model(base, cases.config(method))
    cases.assert_same_state(base, before)
    assert cases.hooks(base) == hooks


def test_merging_and_averaging_are_refused(method: str) -> None:
    model = cases.peft_model(method, adapters=("rte", "sst"))
    given = cases.inputs()
    expected, before, hooks = cases.run(model, "rte", given), cases.state(model), cases.hooks(model)
    for refused in (
        model.merge_adapter,
        lambda: model.merge_adapter(["sst"], safe_merge=True),
        model.merge_and_unload,
        lambda: model.merge_and_unload(progressbar=False, safe_merge=True, adapter_names=["sst"]),
    ):
        with pytest.raises(UnsupportedError, match=f"{method} cannot be merged .* Use unload"):
            refused()
        cases.assert_same_state(model, before)
        assert cases.hooks(model) == hooks
        assert model.get_model_status().merged_adapters == []
    with pytest.raises(UnsupportedError, match=f"add_weighted_adapter is not supported for {method}"):
        model.add_weighted_adapter(["rte", "sst"], [0.5, 0.5], "both")
    model.unmerge_adapter()  # nothing ever is
    assert not model.supports_lora_conversion()
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)


def test_mixed_models_are_refused(method: str) -> None:
    base = cases.bert()
    before = cases.state(base)
    with pytest.raises(ValueError, match=rf"{method.upper()}.*not compatible"):
        get_peft_model(base, cases.config(method), mixed=True)
    cases.assert_same_state(base, before)


def test_another_method_on_one_peft_model_is_refused_by_the_host(method: str) -> None:
    model = cases.peft_model(method)
    other = "lhuc" if method != "lhuc" else "pal"
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("sst", cases.config(other, task_type="SEQ_CLS"))
    assert list(model.peft_config) == ["rte"]
