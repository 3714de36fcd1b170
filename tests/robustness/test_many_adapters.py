"""What this package does in a change of a model does not grow with the adapters there. Counted in Python calls.

The hosts themselves visit every adapter in each of these calls, which is not counted.
"""

from __future__ import annotations

import gc
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import pal_adapters as pa
from tests import zoo

pytestmark = zoo.HOST_WARNINGS
HERE, TORCH = (str(pathlib.Path(str(package.__file__)).parent) for package in (pa, torch))
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pal": ("PAL", {"hidden_size": 4, "num_heads": 2}),
    "parallel_houlsby": ("ParallelHoulsby", {}),
    "camtl": ("CAMTL", {"tasks": ["one", "two"]}),
    "pal and base": ("PAL", {"hidden_size": 4, "num_heads": 2, "train_base": True}),
}


def base() -> Any:
    config = BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    return BertModel(config)


def calls(run: Callable[[], Any]) -> int:
    """The Python calls of this package in `run`, and those of torch on its behalf."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event != "call":
            return
        while frame is not None and frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        count += frame is not None and frame.f_code.co_filename.startswith(HERE)

    before = sys.getprofile()
    gc.disable()  # or finalizers of earlier models would count
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def check(make: Callable[[int], Any], *runs: Callable[[Any], Any]) -> None:
    """15 more adapters must not cost a single call each."""
    few, many = ([calls(lambda run=run, model=model: run(model)) for run in runs] for model in (make(5), make(20)))  # type: ignore[misc]
    assert all(count > 0 for count in few)
    assert all(more < count + 15 for more, count in zip(many, few, strict=True)), f"{few} calls became {many}"


@pytest.mark.parametrize("method", METHODS)
def test_peft(method: str, tmp_path: pathlib.Path) -> None:
    peft = pytest.importorskip("peft")
    name, options = METHODS[method]
    config = getattr(pa, f"{name}PeftConfig")

    def make(adapters: int) -> Any:
        model = peft.get_peft_model(base(), config(**options), adapter_name="t0")
        for number in range(1, adapters):
            model.add_adapter(f"t{number}", config(**options))
        return model

    check(
        make,
        lambda model: model.add_adapter("new", config(**options)),
        lambda model: model.save_pretrained(str(tmp_path), selected_adapters=["t1"]),
        lambda model: model.load_adapter(str(tmp_path / "t1"), "loaded"),
        lambda model: model.set_adapter("t1"),
        lambda model: model.delete_adapter("loaded"),
    )


@pytest.mark.parametrize("method", METHODS)
def test_adapters(method: str, tmp_path: pathlib.Path) -> None:
    adapters = pytest.importorskip("adapters")
    name, options = METHODS[method]
    config = getattr(pa, f"{name}Config")

    def make(count: int) -> Any:
        model = base()
        adapters.init(model)
        for number in range(count):
            model.add_adapter(f"t{number}", config=config(**options))
        return model

    check(
        make,
        lambda model: model.add_adapter("new", config=config(**options)),
        lambda model: model.train_adapter("t1"),
        lambda model: model.save_adapter(str(tmp_path), "t1", use_safetensors=True),
        lambda model: model.load_adapter(str(tmp_path), load_as="loaded", use_safetensors=True),
        lambda model: model.load_adapter(str(tmp_path), load_as="t2", use_safetensors=True),  # over another
        lambda model: model.average_adapter("mean", ["t1", "t3"]),
        lambda model: model.delete_adapter("new"),
    )
