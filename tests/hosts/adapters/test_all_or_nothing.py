"""A call that is rejected leaves the model as it was, and the next correct call works."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import adapters
import pytest
import torch
from adapters import BertAdapterModel, ConfigUnion, LoRAConfig, SeqBnConfig
from adapters.composition import Fuse
from torch import Tensor, nn

import pal_adapters
from pal_adapters import (
    CAMTLConfig,
    LHUCConfig,
    LowRankConfig,
    PalAdaptersError,
    PALConfig,
    ScaLearnConfig,
    StorageError,
    TopAttentionConfig,
)
from tests.robustness.model_state import changes, state

from .tiny import SMALL, add, fresh, output, randomise

OTHER_SITES = {
    "block": "BertLayer", "norm": "post", "attention": "attention", "attention_output": "attention.output.dropout",
    "ffn": "intermediate", "ffn_output": "output.dropout", "output": "output.LayerNorm",
}  # fmt: skip
TIED = PALConfig(hidden_size=12)
COMPACTER = adapters.CompacterConfig(reduction_factor=4, phm_dim=2)

ADDED: dict[str, tuple[str, Any]] = {
    "no block left": ("x", PALConfig(hidden_size=12, leave_out=[0, 1, 2])),
    "the last block left out": ("x", TopAttentionConfig(hidden_size=12, num_heads=3, leave_out=[2])),
    "no such block": ("x", PALConfig(hidden_size=12, leave_out=[3])),
    "name with a dot": ("a.b", SMALL["pal"]),
    "name with a comma": ("a,b", SMALL["low_rank"]),
    "name of an attribute": ("type", SMALL["lhuc"]),
    "empty name": ("", SMALL["lhuc"]),
    "name that is taken": ("old", SMALL["low_rank"]),
    "other sites": ("x", PALConfig(hidden_size=12, sites=OTHER_SITES)),
    "union, one part without a block": (
        "x",
        ConfigUnion(SMALL["low_rank"], PALConfig(hidden_size=12, leave_out=[0, 1, 2])),
    ),
    "union, shared tensors": ("x", ConfigUnion(TIED, COMPACTER)),
    "union, host's part first": ("x", ConfigUnion(LoRAConfig(r=2), LHUCConfig(leave_out=[0, 1, 2]))),
    "conditions of no task": ("x", CAMTLConfig()),
    "raw input of post-LN blocks": ("x", PALConfig(hidden_size=12, pal_input="raw")),
    "more heads than the width has": ("x", "pal[num_heads=5,hidden_size=12]"),
    "string without quotes": ("x", "pal[init_weights=bert]"),
}


@pytest.fixture
def model(bert: nn.Module) -> nn.Module:
    """With one adapter of each kind, one of them active."""
    add(bert, "old", "pal")
    for name in ("a", "b"):
        bert.add_adapter(name, config=SeqBnConfig(reduction_factor=4))
    randomise(bert, "a", "b")
    bert.set_active_adapters("old")
    return bert


def rejected(model: nn.Module, batch: dict[str, Tensor], call: Callable[[], Any]) -> PalAdaptersError | ValueError:
    """The error of a call that must not change the model."""
    before, expected = state(model), output(model, batch)
    with pytest.raises(ValueError) as error:
        call()
    assert not changes(before, state(model))
    assert torch.equal(output(model, batch), expected)
    return error.value


@pytest.mark.parametrize("what", ADDED)
def test_add_adapter(what: str, model: nn.Module, batch: dict[str, Tensor]) -> None:
    name, config = ADDED[what]
    rejected(model, batch, lambda: model.add_adapter(name, config=config, set_active=True))
    model.add_adapter("x", config=SMALL["low_rank"])
    randomise(model, "x")
    assert (output(model, batch, "x") - output(model, batch, None)).abs().max() > 1e-3


@pytest.mark.parametrize("what", [what for what in ADDED if "name" not in what])
def test_an_adapter_that_was_to_be_overwritten_stays(what: str, model: nn.Module, batch: dict[str, Tensor]) -> None:
    if what == "other sites":
        pytest.skip("no other adapter is left, so they are allowed")
    config = ADDED[what][1]
    rejected(model, batch, lambda: model.add_adapter("old", config=config, overwrite_ok=True))


def test_an_interruption_in_the_middle(
    model: nn.Module, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even an interruption in the middle of a block leaves nothing behind."""
    layer = type(model.encoder.layer[0].task_layer)
    add_to_layer = layer.add_adapter

    def stopped(self: Any, adapter_name: str, layer_idx: int) -> bool:
        if layer_idx == 2:
            raise KeyboardInterrupt
        return bool(add_to_layer(self, adapter_name, layer_idx))

    before, expected = state(model), output(model, batch)
    monkeypatch.setattr(layer, "add_adapter", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.add_adapter("x", config=ConfigUnion(LHUCConfig(), LowRankConfig(hidden_size=3)), set_active=True)
    monkeypatch.undo()
    assert not changes(before, state(model))
    assert torch.equal(output(model, batch), expected)
    model.add_adapter("x", config=LHUCConfig(), set_active=True)  # its hooks were not there before
    randomise(model, "x")
    assert (output(model, batch) - output(model, batch, None)).abs().max() > 1e-3


FUSIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "source that is not there": (Fuse("a", "c"), {"config": "scalearn"}),
    "source of another kind": (Fuse("a", "lhuc"), {"config": "scalearn"}),
    "a source twice": (Fuse("a", "a"), {"config": "scalearn"}),
    "name with a dot": (Fuse("a", "b"), {"config": "scalearn", "name": "a.b"}),
    "empty part of a name": (Fuse("a", "b"), {"config": "scalearn", "name": "a,,b"}),
    "fixed for others": (Fuse("a", "b"), {"config": ScaLearnConfig(fixed={"a": 1.0, "c": 1.0})}),
    "name that is taken": (Fuse("a", "old"), {"config": "scalearn_pp"}),
    "AdapterFusion over a module elsewhere": (Fuse("a", "lhuc"), {"config": "dynamic"}),
}


@pytest.mark.parametrize("what", FUSIONS)
def test_add_adapter_fusion(what: str, model: nn.Module, batch: dict[str, Tensor]) -> None:
    add(model, "lhuc", "lhuc")
    model.add_adapter_fusion(Fuse("a", "old"), config="scalearn")
    fuse, arguments = FUSIONS[what]
    rejected(model, batch, lambda: model.add_adapter_fusion(fuse, set_active=True, **arguments))
    model.add_adapter_fusion(Fuse("a", "b"), config="scalearn", set_active=True)
    assert (output(model, batch) - output(model, batch, None)).abs().max() > 1e-3


def test_average_adapter(model: nn.Module, batch: dict[str, Tensor]) -> None:
    add(model, "other", "low_rank")
    rejected(model, batch, lambda: model.average_adapter("x", ["old", "other"]))
    rejected(model, batch, lambda: model.average_adapter("x", ["old"], combine_strategy="lora_delta_w_svd"))
    model.average_adapter("x", ["old"])
    assert torch.equal(output(model, batch, "x"), output(model, batch, "old"))


@pytest.mark.parametrize("data", [[], [{"input_ids": "text"}], [3]], ids=["empty", "not a tensor", "no mapping"])
def test_fold(data: Any, model: nn.Module, batch: dict[str, Tensor]) -> None:
    model.add_adapter_fusion(Fuse("a", "b"), config="scalearn")
    before, expected = state(model), output(model, batch)
    with pytest.raises(Exception):  # noqa: B017 - the host's, of whatever kind
        pal_adapters.fold(model, Fuse("a", "b"), name="x", truncate=2, data=data)
    assert not changes(before, state(model))
    assert torch.equal(output(model, batch), expected)
    pal_adapters.fold(model, Fuse("a", "b"), name="x", truncate=2)


def test_an_adapter_is_not_loaded_without_its_damaged_head(
    base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    saved: Any = fresh(base_path, BertAdapterModel)
    add(saved, "t", "low_rank")
    saved.add_classification_head("t", num_labels=3)
    saved.save_adapter(str(tmp_path), "t")
    file = tmp_path / "pytorch_model_head.bin"
    torch.save({key: value[:1] for key, value in torch.load(file, weights_only=True).items()}, file)
    other: Any = fresh(base_path, BertAdapterModel)
    add(other, "t", "low_rank")
    other.add_classification_head("t", num_labels=2)
    other.set_active_adapters("t")
    before = state(other)
    with torch.no_grad():
        expected = other(**batch).logits
    with pytest.raises(StorageError, match=f"the weights in {tmp_path} cannot be loaded: heads.t.1.weight has shape"):
        other.load_adapter(str(tmp_path))
    assert not changes(before, state(other))
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, expected)
