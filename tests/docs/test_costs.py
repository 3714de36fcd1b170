"""The formulas and examples of docs/costs.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import pal_adapters
from pal_adapters.methods.shared import default_hidden_size
from tests import zoo

pytestmark = zoo.HOST_WARNINGS
PAGE = Path(__file__).resolve().parents[2] / "docs" / "costs.md"


def parameters(width: int, depth: int, pal: int, low_rank: int, houlsby: int, lora: int) -> dict[str, int]:
    """By the formulas of the page."""
    d, n = width, depth
    return {
        "PAL": 2 * d * pal + pal + d + 3 * n * (pal**2 + pal),
        "low-rank": n * (2 * d * low_rank + low_rank + d),
        "Houlsby": 2 * n * (2 * d * houlsby + houlsby + d),
        "LoRA": 4 * n * d * lora,
    }


def test_formulas_are_what_models_have() -> None:
    configs: dict[str, Any] = {
        "PAL": pal_adapters.PALPeftConfig(hidden_size=12),
        "low-rank": pal_adapters.LowRankPeftConfig(hidden_size=5),
        "Houlsby": pal_adapters.HoulsbyPeftConfig(hidden_size=7, train_layernorm=False),
        "LoRA": LoraConfig(r=2, target_modules=["query", "value"]),
    }
    size = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=30)
    counted = {}
    for name, config in configs.items():
        model: Any = get_peft_model(BertModel(BertConfig(**size)), config)
        counted[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == parameters(24, 3, 12, 5, 7, 2)


def bert_block(width: int, inner: int) -> int:
    return 4 * (width + 1) * width + 2 * width * inner + inner + 5 * width


def llama_block(width: int, inner: int) -> int:
    return 4 * width * width + 3 * width * inner + 2 * width


def test_copies() -> None:
    """Those of tiny models by formula, and the page's by the same formulas."""
    small = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=40, vocab_size=30)
    for model, expected in (
        (BertModel(BertConfig(**small)), 3 * bert_block(24, 40) + 25 * 24),
        (LlamaModel(LlamaConfig(**small)), 3 * llama_block(24, 40) + 24),
    ):
        tuned: Any = get_peft_model(model, pal_adapters.CAMTLPeftConfig(tasks=2))
        assert pal_adapters.network_size(tuned).trained_base == expected
    page = PAGE.read_text(encoding="utf-8")
    amounts = []
    for copied, base, width in (
        (7 * bert_block(768, 3072) + 769 * 768, 109_482_240, 4),
        (17 * llama_block(4096, 11008) + 4096, 6_738_415_616, 2),
    ):
        sizes = [width * copied, width * (base + 4 * copied), width * (base + 3 * copied), 4 * width * base]
        amounts.append([f"{copied:,}", *(f"{size / 1e9:,.2f} GB" for size in sizes)])
    for left, right in zip(*amounts, strict=True):
        assert f"| {left} | {right} |" in page


@pytest.mark.parametrize(
    ("width", "depth", "base", "pal", "bytes_of_base"),
    [(768, 12, 109_482_240, 204, 4), (4096, 32, 6_738_415_616, 1026, 2)],
    ids=["BERT-base", "7B"],
)
def test_examples(width: int, depth: int, base: int, pal: int, bytes_of_base: int) -> None:
    assert default_hidden_size(width, depth, base) == pal
    page = PAGE.read_text(encoding="utf-8")
    counts = {**parameters(width, depth, pal, 100, 64, 8), "all weights": base}
    for name, count in counts.items():
        size = count * (bytes_of_base if name == "all weights" else 4)
        cells = [f"{count:,}", f"{size / 1e6:,.1f} MB", f"{size / 1e9 * 100:,.2f} GB", f"{3 * size / 1e6:,.1f} MB"]
        assert f"| {' | '.join(cells)} |" in page
