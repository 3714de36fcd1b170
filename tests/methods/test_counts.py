"""Exact parameter counts per task on models without weights, BERT-base (12 x 768) and BERT-large (24 x 1024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers

import pal_adapters as pa
from tests.methods import RECORDS
from tests.record import Record

BASE = dict(num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
LARGE = dict(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096)
SIZES = {"base": (BASE, 109_482_240), "large": (LARGE, 335_141_888)}

# By method and options; what a task adds on BERT-base and BERT-large stands in the records.
CASES = [(record, options, base, large) for record in RECORDS.values() for options, base, large in record.counts]
IDS = [f"{record.name}-{index}" for index, (record, *_) in enumerate(CASES)]


def bert(size: str) -> transformers.BertModel:
    settings, total = SIZES[size]
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(**settings))
    assert sum(p.numel() for p in model.parameters()) == total
    return model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("record", "options", "base", "large"), CASES, ids=IDS)
def test_peft(size: str, record: Record, options: Mapping[str, Any], base: int, large: int) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(size), record.config_class("peft")(**options))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == {"base": base, "large": large}[size]
    assert total == trainable + SIZES[size][1]
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_adapters(size: str) -> None:
    adapters = pytest.importorskip("adapters")
    with torch.device("meta"):
        model = bert(size)
        adapters.init(model)
        for name, (record, options, _, _) in zip(IDS, CASES, strict=True):
            model.add_adapter(name, config=record.config_class("adapters")(**options))
    counts = {row["name"]: row["#param"] for row in model.adapter_summary(as_dict=True)}
    assert counts.pop("Full model") == SIZES[size][1]
    expected = zip(IDS, CASES, strict=True)
    assert counts == {name: {"base": base, "large": large}[size] for name, (_, _, base, large) in expected}


@pytest.mark.parametrize(
    ("method", "size", "ratio"),
    [("PAL", "base", 1.133), ("PAL", "large", 1.1332), ("LowRank", "base", 1.1354), ("TopAttention", "base", 1.0965)],
)
def test_eight_tasks_beside_one_model(method: str, size: str, ratio: float) -> None:
    """The published claim: eight tasks with PALs make BERT-base 1.13 times as large."""
    peft = pytest.importorskip("peft")
    config = getattr(pa, f"{method}PeftConfig")
    model = peft.get_peft_model(bert(size), config(), adapter_name="t0")
    for task in range(1, 8):
        model.add_adapter(f"t{task}", config())
    total = sum(p.numel() for p in model.parameters())
    assert total / SIZES[size][1] == pytest.approx(ratio, abs=6e-5)
