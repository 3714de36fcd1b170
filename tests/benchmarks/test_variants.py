"""The combinations that `benchmarks/variants.py` measures match their names."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("adapters")

FILE = pathlib.Path(__file__).parents[2] / "benchmarks" / "variants.py"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("variants", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BERT_BASE.update(TINY)
    return module


# Parameters at width 32, 2 blocks, 8 sources: bottlenecks of width 2 at one place, LoRA of rank 8 at two.
COUNTS = {
    "adapters scalearn of 8": 8 * 32 * 2,
    "adapters scalearn_uniform_pp of 8": 8,
    "adapters scalearn of 8, folded": 2 * (2 * 16 * 32 + 16 + 32),
    "peft scalearn of 8 houlsby": 8 * 32 * 2,
    "peft scalearn of 8 houlsby, folded": 2 * (2 * 16 * 32 + 16 + 32),
    "peft scalearn of 8 lora": 8 * 32 * 2 * 2,
    "peft scalearn of 8 lora, folded": 2 * 2 * (64 * 32 * 2),
    "peft scalearn of 8 lora, merged": 0,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COUNTS)
def test_combinations(name: str, bench: Any) -> None:
    model, batch = bench.VARIANTS[name](), bench.inputs(2, 4)
    assert bench.trainable(model) == COUNTS[name]
    assert bench.forward(model, batch) > 0
    if COUNTS[name]:
        assert bench.train_step(model, batch) > 0
    else:
        plain = bench.bert(bench.BERT_BASE)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        with torch.no_grad():
            torch.testing.assert_close(model(**batch)[0], plain(**batch)[0])  # an untrained LoRA adds nothing
