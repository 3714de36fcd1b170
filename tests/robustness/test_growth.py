"""The work of every change of a model grows with its depth, not with the square of it. Counted in Python calls."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
from transformers import BertConfig, BertModel

import pal_adapters as pa
from tests import zoo

pytestmark = zoo.HOST_WARNINGS
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pal": ("PAL", {"hidden_size": 4, "num_heads": 2}),
    "ca_mtl": ("CAMTL", {"tasks": ["a", "b"], "max_length": 8}),
    "parallel_houlsby": ("ParallelHoulsby", {}),
}


def base(depth: int) -> Any:
    config = BertConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=8
    )
    return BertModel(config)


def calls(run: Callable[[], Any]) -> int:
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    gc.disable()  # or finalizers of earlier models would count
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def check(make: Callable[[int], Any], run: Callable[[Any], Any]) -> None:
    models = [make(depth) for depth in (4, 16)]
    few, many = (calls(functools.partial(run, model)) for model in models)
    assert many < 4.5 * few, f"{many / few:.1f} times the calls for 4 times the blocks"


@pytest.mark.parametrize("method", METHODS)
def test_peft(method: str) -> None:
    peft = pytest.importorskip("peft")
    name, options = METHODS[method]
    config = getattr(pa, f"{name}PeftConfig")
    check(base, lambda model: peft.get_peft_model(model, config(**options)))

    def two(depth: int) -> Any:
        model = peft.get_peft_model(base(depth), config(**options), adapter_name="rte")
        model.add_adapter("sst", config(**options))
        return model

    check(two, lambda model: model.add_adapter("qqp", config(**options)))
    check(two, lambda model: model.set_adapter("sst"))
    check(two, lambda model: model.delete_adapter("sst"))


@pytest.mark.parametrize("method", METHODS)
def test_adapters(method: str) -> None:
    adapters = pytest.importorskip("adapters")
    name, options = METHODS[method]
    config = getattr(pa, f"{name}Config")

    def one(depth: int) -> Any:
        model = base(depth)
        adapters.init(model)
        model.add_adapter("a", config=config(**options))
        return model

    check(one, lambda model: model.add_adapter("b", config=config(**options)))
    check(one, lambda model: model.train_adapter("a"))
    check(one, lambda model: model.delete_adapter("a"))


def test_survey() -> None:
    check(base, pa.describe_sites)
