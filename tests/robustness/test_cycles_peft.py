"""Adding, loading and deleting adapters in PEFT again and again leaves nothing behind on the model.

`PAL_ADAPTERS_CYCLES=400` runs more of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import get_peft_model
from transformers import BertConfig, BertModel

import pal_adapters as pa
from tests import zoo
from tests.robustness.model_state import HOOKS

pytestmark = zoo.HOST_WARNINGS
CYCLES = int(os.environ.get("PAL_ADAPTERS_CYCLES", "8"))
TASKS = ["rte", "sst"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "pal": lambda: pa.PALPeftConfig(hidden_size=12, num_heads=2),
    "low_rank": lambda: pa.LowRankPeftConfig(hidden_size=5),
    "lhuc": pa.LHUCPeftConfig,
    "houlsby": lambda: pa.HoulsbyPeftConfig(hidden_size=5),
    "parallel_houlsby": lambda: pa.ParallelHoulsbyPeftConfig(hidden_size=5),
    "houlsby_pal": lambda: pa.HoulsbyPALPeftConfig(hidden_size=12, num_heads=2, bottleneck_size=4),
    "top_attention": lambda: pa.TopAttentionPeftConfig(hidden_size=12, num_layers=2, num_heads=2),
    "top_bert_layer": lambda: pa.TopBertLayerPeftConfig(intermediate_size=16, num_heads=2),
    "ca_mtl": lambda: pa.CAMTLPeftConfig(tasks=TASKS, max_length=16),
}


def counts(model: Any) -> dict[str, int]:
    base = model.get_base_model()
    return {
        "modules": sum(1 for _ in model.modules()),
        "tensors": sum(1 for _ in model.parameters()) + sum(1 for _ in model.buffers()),
        "hooks": sum(len(getattr(m, hooks)) for m in model.modules() for hooks in HOOKS),
        "attributes": sum(len(m.__dict__) for m in model.modules()),
        "adapters": len(model.peft_config) + len(base.peft_config),
    }


@pytest.mark.parametrize("method", CONFIGS)
def test_adapters(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = get_peft_model(BertModel(config), CONFIGS[method](), adapter_name="first").eval()
    model.save_pretrained(str(tmp_path))
    more: dict[str, Any] = {"task_ids": [0, 1]} if method == "ca_mtl" else {}
    ids = torch.arange(3, 17).view(2, 7)
    found = []
    for cycle in range(CYCLES):
        name = f"name{cycle}"
        if cycle % 2:
            model.load_adapter(str(tmp_path / "first"), name)
        else:
            model.add_adapter(name, CONFIGS[method]())
        model.set_adapter(name)
        with torch.no_grad():
            model(input_ids=ids, **more)
        model.set_adapter("first")
        model.delete_adapter(name)
        found.append(counts(model))
    assert found[-1] == found[0]
