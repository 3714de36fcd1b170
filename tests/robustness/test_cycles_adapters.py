"""Adding and deleting adapters again and again leaves nothing behind: modules, hooks, tensors, entries of configs.

`PAL_ADAPTERS_CYCLES=400` runs more of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

adapters = pytest.importorskip("adapters")

from adapters.composition import Fuse  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

import pal_adapters as pa  # noqa: E402
from tests.robustness.model_state import HOOKS  # noqa: E402

CYCLES = int(os.environ.get("PAL_ADAPTERS_CYCLES", "20"))
CONFIGS: dict[str, Callable[[], Any]] = {
    "pal": pa.PALConfig,
    "pal and base": lambda: pa.PALConfig(train_base=True),
    "low_rank": pa.LowRankConfig,
    "lhuc": pa.LHUCConfig,
    "top_attention": lambda: pa.TopAttentionConfig(hidden_size=12, num_layers=2, num_heads=2),
    "top_bert_layer": lambda: pa.TopBertLayerConfig(intermediate_size=16, num_heads=2),
    "parallel_houlsby": pa.ParallelHoulsbyConfig,
    "houlsby_pal": pa.HoulsbyPALConfig,
    "ca_mtl": lambda: pa.CAMTLConfig(tasks=2, max_length=8),
    "union": lambda: adapters.ConfigUnion(pa.PALConfig(hidden_size=12), adapters.LoRAConfig(r=2)),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)).eval()
    adapters.init(model)
    return model


def _counts(model: Any) -> dict[str, int]:
    known = model.adapters_config
    return {
        "modules": sum(1 for _ in model.modules()),
        "tensors": sum(1 for _ in model.parameters()) + sum(1 for _ in model.buffers()),
        "hooks": sum(len(getattr(m, hooks)) for m in model.modules() for hooks in HOOKS),
        "attributes": sum(len(m.__dict__) for m in model.modules()),
        "adapters": len(known.adapters),
        "configs": len(known.config_map),
        "fusions": len(known.fusions),
        "fusion configs": len(known.fusion_config_map),
        "fusion names": len(known.fusion_name_map),
        "shared": len(model.shared_parameters),
        "tied": len(model._tied_weights_keys or ()),
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters(kind: str) -> None:
    model = _model()
    counts = []
    for cycle in range(CYCLES):
        config = CONFIGS[kind]()
        if kind != "union":
            config = config.replace(init_weights_seed=cycle)  # another config each time
        model.add_adapter(f"name{cycle}", config=config, set_active=True)
        arguments = {"task_ids": [0]} if kind == "ca_mtl" else {}
        with torch.no_grad():
            model(torch.arange(3, 10)[None], **arguments)
        model.set_active_adapters(None)
        model.delete_adapter(f"name{cycle}")
        counts.append(_counts(model))
    assert counts[-1] == counts[0]


@pytest.mark.parametrize("config", ["scalearn", "scalearn_uniform_pp"])
def test_fusions(config: str) -> None:
    model = _model()
    model.add_adapter("a", config=adapters.SeqBnConfig(reduction_factor=4))
    counts = []
    for cycle in range(CYCLES):
        name = f"name{cycle}"
        model.add_adapter(name, config=pa.PALConfig(hidden_size=6, num_heads=2))
        fuse = Fuse("a", name, name=f"fusion{cycle}")
        model.add_adapter_fusion(fuse, config=pa.ScaLearnConfig(variant=config, regularization=0.1 + cycle))
        model.set_active_adapters(None)
        model.delete_adapter_fusion(fuse)
        model.delete_adapter(name)
        counts.append(_counts(model))
    assert counts[-1] == counts[0]


def test_rejections() -> None:
    model = _model()
    counts = []
    for _ in range(CYCLES):
        with pytest.raises(pa.ConfigError):
            model.add_adapter("x", config=pa.PALConfig(hidden_size=12, leave_out=[0, 1]))
        counts.append(_counts(model))
    assert counts[-1] == counts[0]
