"""`generate` with one adapter, or one per example, equal to generating each example on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from pal_adapters import UnsupportedError

from . import cases

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 2, "num_return_sequences": 2},
}


def prompt(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 40, (rows, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def one_by_one(model: Any, names: list[str], given: dict[str, Tensor], **how: Any) -> Tensor:
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model.generate(**cases.rows_of(given, i), **GREEDY, **how))
        else:
            model.set_adapter(name)
            rows.append(model.generate(**cases.rows_of(given, i), **GREEDY, **how))
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_one_adapter_a_row(method: str, name: str) -> None:
    model = cases.peft_model(method, name, adapters=("rte", "sst"))
    names, given = ["sst", "__base__", "rte"], prompt(3)
    outputs = []
    for how in WAYS.values():
        expected = one_by_one(model, names, given, **how)
        got = model.generate(**given, adapter_names=names, **GREEDY, **how)
        assert torch.equal(got, expected), how
        outputs.append(got)
    if name in ("llama", "gpt2"):  # the encoder-decoders repeat one token whatever they read
        assert not torch.equal(outputs[0][0], outputs[0][2])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_with_and_without_a_cache(method: str, name: str) -> None:
    model = cases.peft_model(method, name, adapters=("rte", "sst"))
    names, given = ["sst", "rte"], prompt(2)
    for how in ({}, {"num_beams": 2}):
        cached = model.generate(**given, adapter_names=names, use_cache=True, **GREEDY, **how)
        plain = model.generate(**given, adapter_names=names, use_cache=False, **GREEDY, **how)
        assert torch.equal(cached, plain), how


def test_without_a_task_type(method: str) -> None:
    """`PeftModel.generate` calls the base model past the tuner."""
    model = cases.peft_model(method, "gpt2", adapters=("rte", "sst"), task_type=None)
    names, given = ["sst", "rte"], prompt(2)
    for how in WAYS.values():
        expected = one_by_one(model, names, given, **how)
        assert torch.equal(model.generate(**given, adapter_names=names, **GREEDY, **how), expected)


def test_heads_in_generation(method: str) -> None:
    model = cases.peft_model(method, "llama", adapters=("rte", "sst"), modules_to_save=["lm_head"])
    names, given = ["sst", "rte", "__base__"], prompt(3)
    for how in WAYS.values():
        expected = one_by_one(model, names, given, **how)
        assert torch.equal(model.generate(**given, adapter_names=names, **GREEDY, **how), expected)


def test_left_padding() -> None:
    model = cases.peft_model("pal", "llama", adapters=("rte", "sst"))
    given = prompt(2)
    short = {key: value[1:, 2:] for key, value in given.items()}
    given["input_ids"][1, :2] = 0
    given["attention_mask"][1, :2] = 0
    got = model.generate(**given, adapter_names=["sst", "rte"], **GREEDY)
    model.set_adapter("rte")
    assert torch.equal(got[1, -5:], model.generate(**short, **GREEDY)[0, -5:])


def test_beams_of_the_models_own_settings() -> None:
    model = cases.peft_model("low_rank", "llama", adapters=("rte", "sst"))
    model.generation_config.num_beams = 2
    names, given = ["sst", "rte"], prompt(2)
    expected = one_by_one(model, names, given)
    assert torch.equal(model.generate(**given, adapter_names=names, **GREEDY), expected)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_wrong_names_and_afterwards(task_type: str | None) -> None:
    model = cases.peft_model("pal", "gpt2", adapters=("rte", "sst"), task_type=task_type)
    assert isinstance(model, PeftModel)
    given = prompt(4)
    model.set_adapter("rte")
    expected = model.generate(**given, **GREEDY)
    with pytest.raises(UnsupportedError, match="3 adapter names were passed for a batch of 4 examples"):
        model.generate(**given, adapter_names=["rte", "sst", "rte"], **GREEDY)
    with pytest.raises(ValueError, match="'nothing'"):
        model.generate(**given, adapter_names=["nothing"] * 4, **GREEDY)
    assert torch.equal(model.generate(**given, **GREEDY), expected)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="has 2 names, but the batch has 4 examples"):
        model(**given, adapter_names=["rte", "sst"])  # a forward pass repeats no rows
