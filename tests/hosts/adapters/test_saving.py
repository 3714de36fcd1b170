"""Files: single adapters, setups and whole models, read in the same and in a new process."""

from __future__ import annotations

import copy
import io
import json
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import adapters
import pytest
import torch
from adapters import AutoAdapterModel
from adapters.composition import BatchSplit, Fuse, Stack
from adapters.wrappers import load_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from pal_adapters import LowRankConfig, PALConfig, ParallelHoulsbyConfig

from .tiny import SMALL, add, fresh, hidden, output, parameters_of, randomise

SAFE = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
METHODS = pytest.mark.parametrize("method", list(SMALL))


@SAFE
@METHODS
def test_save_and_load(
    method: str, safe: bool, bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    add(bert, "a", method)
    add(bert, "ab", method)  # contains the other name
    wanted = {name: output(bert, batch, name) for name in ("a", "ab")}
    for name in wanted:
        bert.save_adapter(str(tmp_path / name), name, use_safetensors=safe)
    file = tmp_path / "a" / ("model.safetensors" if safe else "pytorch_adapter.bin")
    if safe:
        file = next((tmp_path / "a").glob("*.safetensors"))
        saved = load_file(file)
    else:
        saved = torch.load(file, weights_only=True)
    assert saved.keys() == parameters_of(bert, "a").keys()
    assert all(torch.equal(value, bert.state_dict()[key]) for key, value in saved.items())
    other = fresh(base_path)
    for name in wanted:
        info: dict[str, Any] = {}
        assert other.load_adapter(str(tmp_path / name), use_safetensors=safe, loading_info=info) == name
        assert (info["missing_keys"], info["unexpected_keys"]) == ([], [])
        assert other.adapters_config.get(name) == bert.adapters_config.get(name)
    for name, expected in wanted.items():
        assert torch.equal(output(other, batch, name), expected)


@SAFE
@pytest.mark.parametrize("target", [BertModel, BertForSequenceClassification, BertForMaskedLM, "auto"])
@pytest.mark.parametrize("source", [BertModel, BertForSequenceClassification])
def test_between_head_classes(
    source: Any, target: Any, safe: bool, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    first = fresh(base_path, source)
    config = adapters.ConfigUnion(
        SMALL["pal"], SMALL["parallel_houlsby"], adapters.SeqBnConfig(), adapters.LoRAConfig()
    )
    first.add_adapter("a", config=config)
    randomise(first, "a")
    expected = hidden(first, batch, "a")
    first.save_adapter(str(tmp_path / "a"), "a", use_safetensors=safe)
    if target == "auto":
        second = AutoAdapterModel.from_pretrained(base_path).eval()
        second.add_classification_head("b", num_labels=2)
    else:
        second = fresh(base_path, target)
    info: dict[str, Any] = {}
    second.load_adapter(str(tmp_path / "a"), load_as="b", use_safetensors=safe, loading_info=info)
    assert (info["missing_keys"], info["unexpected_keys"]) == ([], [])
    assert torch.equal(hidden(second, batch, "b"), expected)


def test_load_with_leave_out(
    bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    bert.add_adapter("a", config=PALConfig(hidden_size=12, leave_out=[2]))
    randomise(bert, "a")
    bert.save_adapter(str(tmp_path / "a"), "a", use_safetensors=True)
    other = fresh(base_path)
    other.load_adapter(str(tmp_path / "a"), leave_out=[0], use_safetensors=True)
    assert sorted(other.adapters_config.get("a").leave_out) == [0, 2]
    assert sorted(other.get_adapter("a")) == [-1, 1]
    bert.set_active_adapters("a", skip_layers=[0])
    assert torch.equal(output(other, batch, "a"), output(bert, batch))


def test_load_over_an_adapter_of_the_same_name(
    bert: nn.Module, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    add(bert, "a", "pal")
    before = output(bert, batch, "a")
    bert.save_adapter(str(tmp_path / "a"), "a", use_safetensors=True)
    randomise(bert, "a")
    assert (output(bert, batch) - before).abs().max() > 1e-3
    bert.load_adapter(str(tmp_path / "a"), use_safetensors=True)
    assert torch.equal(output(bert, batch), before)


def test_the_default_width_is_in_the_file(bert: nn.Module, tmp_path: pathlib.Path) -> None:
    bert.add_adapter("a", config="pal")
    bert.save_adapter(str(tmp_path / "a"), "a")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["config"]
    assert saved["architecture"] == "pal"
    assert saved["hidden_size"] is None
    assert saved["chosen"] == {"hidden_size": bert.adapters_config.get("a").resolved().hidden_size}


@SAFE
def test_all_adapters(
    safe: bool, bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    for method in SMALL:
        add(bert, method, method)
    wanted = {name: output(bert, batch, name) for name in SMALL}
    bert.save_all_adapters(str(tmp_path), use_safetensors=safe)
    assert {path.name for path in tmp_path.iterdir()} == set(SMALL)
    other = fresh(base_path)
    for name in SMALL:
        other.load_adapter(str(tmp_path / name), use_safetensors=safe)
    for name, expected in wanted.items():
        assert torch.equal(output(other, batch, name), expected)


@SAFE
@pytest.mark.parametrize("kind", ["stack", "fuse"])
def test_adapter_setup(
    kind: str, safe: bool, bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    add(bert, "a", "pal")
    add(bert, "b", "low_rank")
    bert.add_adapter("s", config="seq_bn")
    setup = Stack("a", "s", "b") if kind == "stack" else Stack("b", Fuse("a", "s"))
    if kind == "fuse":
        bert.add_adapter_fusion(Fuse("a", "s"))
        bert.eval()
    expected = output(bert, batch, setup)
    bert.save_adapter_setup(str(tmp_path), setup, use_safetensors=safe)
    other = fresh(base_path)
    loaded, _ = other.load_adapter_setup(str(tmp_path), set_active=True, use_safetensors=safe)
    other.eval()
    assert loaded == setup
    assert torch.equal(output(other, batch), expected)


def whole(base_path: pathlib.Path, model_class: Any) -> nn.Module:
    model = fresh(base_path, model_class)
    model.add_adapter("a", config=PALConfig())
    model.add_adapter("ab", config=ParallelHoulsbyConfig(hidden_size=4))
    model.add_adapter("u", config=adapters.ConfigUnion(PALConfig(hidden_size=18), LowRankConfig(hidden_size=3)))
    model.add_adapter("s", config="seq_bn")
    randomise(model, "a", "ab", "u", "s")
    model.add_adapter_fusion(Fuse("a", "s"))
    return model.eval()


SETUPS = ("a", "ab", "u", Stack("a", "s"), BatchSplit("a", "s", batch_sizes=2), Fuse("a", "s"))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("model_class", [BertModel, BertForSequenceClassification])
def test_whole_model(
    model_class: Any, safe: bool, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    model = whole(base_path, model_class)
    wanted = [hidden(model, batch, setup) for setup in SETUPS]
    model.save_pretrained(tmp_path, safe_serialization=safe)
    other, info = load_model(tmp_path, model_class, output_loading_info=True, use_safetensors=safe)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert other.state_dict().keys() == model.state_dict().keys()
    for setup, expected in zip(SETUPS, wanted, strict=True):
        assert torch.equal(hidden(other.eval(), batch, setup), expected)
    assert other.base_model.shared_parameters["a"] is not None
    assert other.get_adapter("a")[-1]["shared"] is other.base_model.shared_parameters["a"]
    other.train_adapter("a")  # the loaded tensors are the ones that train
    other(**batch)[0].sum().backward()
    assert all(p.grad is not None for p in other.base_model.shared_parameters["a"].values())


def test_whole_flexible_model(base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path) -> None:
    model = AutoAdapterModel.from_pretrained(base_path).eval()
    for name, method in (("a", "pal"), ("ab", "top_attention")):
        add(model, name, method)
        model.add_classification_head(name, num_labels=3)
    model.eval()
    wanted = {}
    for name in ("a", "ab"):
        model.set_active_adapters(name)
        assert model.active_head == name
        with torch.no_grad():
            wanted[name] = model(**batch).logits
    assert (wanted["a"] - wanted["ab"]).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    other = AutoAdapterModel.from_pretrained(tmp_path).eval()
    for name, expected in wanted.items():
        other.set_active_adapters(name)
        other.active_head = name
        with torch.no_grad():
            assert torch.equal(other(**batch).logits, expected)


def test_new_process(
    base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path, python: Callable[[str], str]
) -> None:
    """All methods, both kinds of file, other head classes and whole models, read in a new process."""
    model = fresh(base_path, BertForSequenceClassification)
    names = {"a": "pal", "ab": "low_rank", "abc": "parallel_houlsby", "b": "houlsby_pal", "bc": "lhuc",
             "c": "top_attention", "ca": "top_bert_layer"}  # fmt: skip
    for name, method in names.items():
        add(model, name, method)
    model.add_adapter("u", config=adapters.ConfigUnion(PALConfig(), adapters.LoRAConfig(init_weights="bert")))
    randomise(model, "u")
    wanted = {name: hidden(model, batch, name) for name in [*names, "u"]}
    wanted["stack"] = hidden(model, batch, Stack("a", "ab"))
    for safe in (True, False):
        model.save_all_adapters(str(tmp_path / f"safe{safe}"), use_safetensors=safe)
    model.save_pretrained(tmp_path / "whole")
    torch.save({"batch": batch, "wanted": wanted}, tmp_path / "expected.pt")
    out = python(f"""
        import torch, adapters, pal_adapters
        from adapters import AutoAdapterModel, Stack
        from adapters.wrappers import load_model
        from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel
        data = torch.load("expected.pt", weights_only=True)
        def hidden(model, setup):
            model.eval().set_active_adapters(setup)
            with torch.no_grad():
                return model(**data["batch"], output_hidden_states=True).hidden_states[-1]
        checked = 0
        for safe in (True, False):
            for model_class in (BertModel, BertForMaskedLM):
                model = model_class.from_pretrained({str(base_path)!r})
                adapters.init(model)
                for name in data["wanted"]:
                    if name != "stack":
                        model.load_adapter(f"safe{{safe}}/{{name}}", load_as="x" + name, use_safetensors=safe)
                for name, expected in data["wanted"].items():
                    setup = Stack("xa", "xab") if name == "stack" else "x" + name
                    assert torch.equal(hidden(model, setup), expected), (safe, model_class, name)
                    checked += 1
        for model in (load_model("whole", BertForSequenceClassification), load_model("whole", BertModel)):
            for name, expected in data["wanted"].items():
                setup = Stack("a", "ab") if name == "stack" else name
                assert torch.equal(hidden(model, setup), expected), name
                checked += 1
        print(checked)
    """)
    assert int(out) == 6 * len(wanted)


def test_deepcopy(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    add(bert, "a", "pal")
    add(bert, "t", "top_attention")
    bert.add_adapter("s", config="seq_bn")
    for setup in ("a", "t", Stack("a", "s"), BatchSplit("s", "a", batch_sizes=2)):
        before = output(bert, batch, setup)
        twin = copy.deepcopy(bert)
        assert torch.equal(output(twin, batch), before)
        randomise(twin, "a", "t")
        assert (output(twin, batch) - before).abs().max() > 1e-3
        assert torch.equal(output(bert, batch), before)
        mine, theirs = ({id(m) for m in model.modules()} for model in (bert, twin))
        assert mine.isdisjoint(theirs)
        task_layer = twin.encoder.layer[0].task_layer
        assert task_layer._model[0] is twin
        assert task_layer.attachment.runner is task_layer
        assert task_layer.block.module is twin.encoder.layer[0]


def test_pickle(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    """Models of the host cannot be pickled, as their classes are made at run time; our parts can."""
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(bert)
    add(bert, "a", "pal")
    before = output(bert, batch, "a")
    layer = bert.encoder.layer[0].task_layer
    own = {id(module) for module in layer.modules()}
    hosts = {id(module): module for module in bert.modules() if id(module) not in own}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> int | None:
            return id(value) if id(value) in hosts else None

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, key: int) -> nn.Module:
            return hosts[key]

    file = io.BytesIO()
    Pickler(file).dump(layer)
    layer.attachment.remove()
    file.seek(0)
    twin = Unpickler(file).load()
    twin.attachment.remove()
    twin.attachment.require({"residual"}, {"x", "mask"})
    bert.encoder.layer[0].task_layer = twin
    assert torch.equal(output(bert, batch), before)


def test_state_dict_round_trip(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    """`load_state_dict` sets the tied projections, once each, and a replaced parameter is used."""
    add(bert, "a", "pal")
    twin = copy.deepcopy(bert)
    randomise(twin, "a")
    keys = [key for key in bert.state_dict() if "encoder_weight" in key]
    assert keys == ["shared_parameters.a.pal_stack0_encoder_weight"]
    bert.load_state_dict(twin.state_dict())
    assert torch.equal(output(bert, batch, "a"), output(twin, batch, "a"))
    table = bert.shared_parameters["a"]
    table["pal_stack0_encoder_weight"] = nn.Parameter(torch.zeros_like(table["pal_stack0_encoder_weight"]))
    twin.shared_parameters["a"]["pal_stack0_encoder_weight"].data.zero_()
    assert torch.equal(output(bert, batch), output(twin, batch))
