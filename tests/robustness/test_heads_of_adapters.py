"""Heads of `adapters` beside our adapters: a damaged file is rejected, and the model is what it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

adapters = pytest.importorskip("adapters")

from adapters import AdapterModelInterface, BertAdapterModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import BertConfig, BertForMaskedLM, BertModel  # noqa: E402

import pal_adapters as pa  # noqa: E402
from tests import zoo  # noqa: E402
from tests.robustness.model_state import changes, state  # noqa: E402

pytestmark = zoo.HOST_WARNINGS
SIZE = dict(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
PAL = pa.PALConfig(hidden_size=12, num_heads=2)
IDS = torch.arange(3, 17).view(2, 7)


def model_with(name: str) -> Any:
    torch.manual_seed(0)
    model = BertAdapterModel(BertConfig(**SIZE))
    model.add_adapter(name, config=PAL)
    model.add_classification_head(name, num_labels=3)
    model.set_active_adapters(name)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def half(tensors: dict[str, Any]) -> Any:
    return dict(sorted(tensors.items())[::2])


def not_finite(tensors: dict[str, Any]) -> Any:
    return {name: tensor * float("nan") for name, tensor in tensors.items()}


def wider(tensors: dict[str, Any]) -> Any:
    return {name: torch.cat([tensor, tensor[:1]]) for name, tensor in tensors.items()}


def a_list(tensors: dict[str, Any]) -> Any:
    return list(tensors)


@pytest.mark.parametrize("door", ["load_adapter", "load_head"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("damage", [half, not_finite, wider, a_list])
def test_weights(door: str, safe: bool, damage: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    if safe and damage is a_list:
        pytest.skip("safetensors files hold tensors")
    saved = model_with("rte")
    torch.nn.init.normal_(saved.heads["rte"][1].bias)
    saved.save_adapter(str(tmp_path), "rte", with_head=True, use_safetensors=safe)
    file = tmp_path / ("model_head.safetensors" if safe else "pytorch_model_head.bin")
    whole = load_file(file) if safe else torch.load(file, weights_only=True)
    save_file(damage(whole), file) if safe else torch.save(damage(whole), file)
    model = model_with("sst")
    before, expected = state(model), logits(model)
    with pytest.raises(pa.StorageError, match=str(tmp_path)):
        getattr(model, door)(str(tmp_path), use_safetensors=safe)
    assert not changes(before, state(model))
    assert torch.equal(logits(model), expected)
    save_file(whole, file) if safe else torch.save(whole, file)
    model.load_adapter(str(tmp_path), use_safetensors=safe, set_active=True)
    assert torch.equal(logits(model), logits(saved))


@pytest.mark.parametrize("damage", ["no weights", "unknown kind"])
def test_folders(damage: str, tmp_path: Path) -> None:
    model_with("rte").save_adapter(str(tmp_path), "rte", with_head=True, use_safetensors=True)
    if damage == "no weights":
        (tmp_path / "model_head.safetensors").unlink()
    else:
        file = tmp_path / "head_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "config": {"head_type": "other"}}))
    model = model_with("sst")
    before = state(model)
    with pytest.raises(pa.StorageError, match=str(tmp_path)):
        model.load_adapter(str(tmp_path), use_safetensors=True)
    assert not changes(before, state(model))


def test_a_head_that_is_tied_to_the_embeddings(tmp_path: Path) -> None:
    model: Any = BertForMaskedLM(BertConfig(**SIZE)).eval()
    adapters.init(model)
    model.add_adapter("rte", config=PAL)
    model.save_head(str(tmp_path))
    other = copy.deepcopy(model)
    torch.nn.init.ones_(other.cls.predictions.transform.dense.bias)
    other.load_head(str(tmp_path))
    assert torch.equal(logits(other), logits(model))


def test_averages() -> None:
    model = model_with("rte")
    model.add_adapter("sst", config=PAL)
    before = state(model)
    with pytest.raises(pa.ConfigError, match="weights="):
        model.average_adapter("both", ["rte", "sst"], [0.5, float("nan")])
    with pytest.raises(pa.UnknownAdapterError, match="'qqp'"):
        model.average_adapter("both", ["rte", "qqp"])
    assert not changes(before, state(model))


def test_a_rejected_choice_of_what_trains() -> None:
    model = model_with("rte")
    before = state(model)
    with pytest.raises(ValueError, match="zz"):
        model.train_adapter("zz")
    assert not changes(before, state(model))


class TwoTowers(BertModel):
    """Of whose two lists of blocks an interface names one."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.other = BertModel(config).encoder
        self.post_init()


def test_a_model_that_is_reached_in_part() -> None:
    model: Any = TwoTowers(BertConfig(**SIZE))
    adapters.init(model, interface=AdapterModelInterface(
        adapter_methods=["bottleneck"], model_embeddings="embeddings", model_layers="encoder.layer",
        layer_self_attn="attention", layer_cross_attn=None, attn_k_proj="self.key", attn_q_proj="self.query",
        attn_v_proj="self.value", attn_o_proj="output.dense", layer_intermediate_proj="intermediate.dense",
        layer_output_proj="output.dense",
    ))  # fmt: skip
    with pytest.warns(UserWarning, match=r"only a part of TwoTowers is adapted: encoder\.layer"):
        model.add_adapter("rte", config=PAL)
