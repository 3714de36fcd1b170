"""Public functions that get something other than a model, or other than names, say what to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import pal_adapters as pa
from tests import zoo

pytestmark = zoo.HOST_WARNINGS
IDS = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
OF_A_MODEL: dict[str, Callable[[Any], Any]] = {
    "add_task": lambda model: pa.add_task(model, "mnli"),
    "train_tasks": lambda model: pa.train_tasks(model, ["mnli"]),
    "network_size": pa.network_size,
    "describe_sites": pa.describe_sites,
    "export_program": lambda model: pa.export_program(model, IDS),
    "fold": pa.fold,
    "check_fold": pa.check_fold,
    "transfer_report": pa.transfer_report,
}


@pytest.mark.parametrize("model", [None, "bert-base-uncased", 3], ids=str)
@pytest.mark.parametrize("function", OF_A_MODEL)
def test_not_a_model(function: str, model: Any) -> None:
    with pytest.raises(pa.PalAdaptersError, match="model"):
        OF_A_MODEL[function](model)


@pytest.mark.parametrize("inputs", ["a fine film", None, 3], ids=str)
def test_inputs_of_an_export(inputs: Any) -> None:
    with pytest.raises(pa.ConfigError, match=r"inputs=.* a mapping of tensors"):
        pa.export_program(torch.nn.Linear(2, 2), inputs)


def test_tasks_are_names() -> None:
    peft = pytest.importorskip("peft")
    sizes = dict(vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = peft.get_peft_model(BertModel(BertConfig(**sizes)), pa.CAMTLPeftConfig(tasks=["a", "b"]))
    for tasks in ("a", 3):
        with pytest.raises(pa.ConfigError, match=f"tasks={tasks!r} is not allowed: pass a list of names"):
            pa.train_tasks(model, tasks)  # type: ignore[arg-type]
    with pytest.raises(pa.ConfigError, match="adapter_name=3 is not allowed"):
        pa.add_task(model, "c", 3)  # type: ignore[arg-type]
