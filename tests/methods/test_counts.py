"""Exact parameter counts per task on models without weights, BERT-base (12 x 768) and BERT-large (24 x 1024)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import pal_adapters as pa

BASE = dict(num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
LARGE = dict(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096)
SIZES = {"base": (BASE, 109_482_240), "large": (LARGE, 335_141_888)}

# method, its config, options; per task on base and on large, by hand from the formulas:
# PAL 2 d r + r + d + 3 L (r^2 + r), low-rank L (2 d r + r + d), Houlsby variant 2 L (2 d r + r + d),
# top 2 d r + r + d + 6 (4 (r^2 + r) + 2 r), LHUC L d
CASES: list[tuple[str, str, dict[str, Any], int, int]] = [
    ("pal", "PAL", {"hidden_size": 204}, 1_819_836, 3_430_060),
    ("pal, width by the model", "PAL", {}, 1_819_836, 5_579_080),
    ("low_rank", "LowRank", {}, 1_853_616, 4_942_176),
    ("top_attention", "TopAttention", {}, 1_320_444, 1_425_148),
    ("top_bert_layer", "TopBertLayer", {}, 7_087_872, 12_596_224),
    ("lhuc", "LHUC", {}, 9_216, 24_576),
    ("parallel_houlsby", "ParallelHoulsby", {}, 1_862_832, 4_966_752),
    ("houlsby_pal", "HoulsbyPAL", {}, 2_053_668, 4_567_468),
]


def bert(size: str) -> transformers.BertModel:
    settings, total = SIZES[size]
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(**settings))
    assert sum(p.numel() for p in model.parameters()) == total
    return model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "config", "options", "base", "large"), CASES, ids=[case[0] for case in CASES])
def test_peft(size: str, name: str, config: str, options: dict[str, Any], base: int, large: int) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(size), getattr(pa, f"{config}PeftConfig")(**options))
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
        for name, config, options, _, _ in CASES:
            model.add_adapter(name, config=getattr(pa, f"{config}Config")(**options))
    counts = {row["name"]: row["#param"] for row in model.adapter_summary(as_dict=True)}
    assert counts.pop("Full model") == SIZES[size][1]
    assert counts == {name: {"base": base, "large": large}[size] for name, _, _, base, large in CASES}


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
