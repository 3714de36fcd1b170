"""`adapters`: a change of a model that is stopped at any point leaves the model as it was, and works the next time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

adapters = pytest.importorskip("adapters")

from adapters.composition import Fuse  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

import pal_adapters as pa  # noqa: E402

from .interrupts import stopped  # noqa: E402
from .model_state import changes, state  # noqa: E402

POINTS = int(os.environ.get("PAL_ADAPTERS_INTERRUPTS", "6"))
IDS = torch.arange(3, 31).reshape(4, 7)
FUSE = Fuse("one", "two")
CONFIGS: dict[str, Callable[[], Any]] = {
    "pal": lambda: pa.PALConfig(hidden_size=12, num_heads=2, init_weights="bert"),
    "pal and base": lambda: pa.PALConfig(hidden_size=12, num_heads=2, train_base=True),
    "ca_mtl": lambda: pa.CAMTLConfig(tasks=["rte", "sst"], max_length=16),
    "in place": lambda: pa.CAMTLConfig(
        tasks=["rte", "sst"], max_length=16, base_weights="in_place", top_block_init="scratch"
    ),
    "union": lambda: adapters.ConfigUnion(pa.PALConfig(hidden_size=12, num_heads=2), adapters.LoRAConfig(r=2)),
    "bottleneck": lambda: adapters.SeqBnConfig(reduction_factor=4),
}


def model_with(method: str, *names: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, intermediate_size=32)).eval()
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=CONFIGS[method]())
    model.set_active_adapters(names[0] if names else None)
    return model


def fused() -> Any:
    model = model_with("bottleneck", "one", "two")
    model.add_adapter_fusion(FUSE, config="scalearn")
    model.set_active_adapters(FUSE)
    return model


def states(model: Any) -> torch.Tensor:
    ca_mtl = any(isinstance(config, pa.CAMTLConfig) for config in model.adapters_config.config_map.values())
    with torch.no_grad():
        return model(IDS, **({"task_ids": [0, 1, 0, 1]} if ca_mtl else {})).last_hidden_state


def check(make: Callable[[], Any], change: Callable[[Any], Any]) -> None:
    model = make()
    before, expected = state(model), states(model)
    for _ in stopped(change, model, make(), POINTS):
        assert not changes(before, state(model))
        assert torch.equal(states(model), expected)
    change(model)


@pytest.mark.parametrize("method", CONFIGS)
def test_adapters(method: str, tmp_path: Path) -> None:
    model_with(method, "new").save_adapter(str(tmp_path), "new", use_safetensors=True)
    check(lambda: model_with(method), lambda model: model.add_adapter("new", config=CONFIGS[method]()))
    check(lambda: model_with(method), lambda model: model.load_adapter(str(tmp_path), use_safetensors=True))
    names = ("one",) if method == "in place" else ("one", "two")
    for name in names:
        check(lambda: model_with(method, *names), lambda model: model.delete_adapter(name))  # noqa: B023
    check(lambda: model_with(method, *names), lambda model: model.train_adapter(names[-1]))
    if method == "in place":
        check(lambda: model_with(method, "new"), lambda model: model.load_adapter(str(tmp_path), use_safetensors=True))


def test_fusions(tmp_path: Path) -> None:
    fused().save_adapter_fusion(str(tmp_path / "fusion"), "one,two", use_safetensors=True)
    fused().save_adapter_setup(str(tmp_path / "setup"), FUSE, use_safetensors=True)
    sources = lambda: model_with("bottleneck", "one", "two")  # noqa: E731
    check(sources, lambda model: model.add_adapter_fusion(FUSE, config="scalearn"))
    check(sources, lambda model: model.load_adapter_fusion(str(tmp_path / "fusion"), use_safetensors=True))
    check(lambda: model_with("bottleneck"), lambda model: model.load_adapter_setup(
        str(tmp_path / "setup"), use_safetensors=True, set_active=True
    ))  # fmt: skip
    check(fused, lambda model: model.delete_adapter_fusion(FUSE))
    check(fused, lambda model: model.train_adapter_fusion(FUSE))
    check(fused, lambda model: pa.fold(model, FUSE, name="folded"))
    check(fused, lambda model: pa.fold(model, FUSE, name="folded", truncate=3, data=[{"input_ids": IDS}]))


def test_tasks_of_a_network() -> None:
    steps: list[Callable[[Any], Any]] = [
        lambda model: pa.add_task(model, "new", "net"),
        lambda model: pa.train_tasks(model, ["rte"], "net"),
    ]
    for change in steps:
        check(lambda: model_with("ca_mtl", "net"), change)
