"""Public functions that get something other than a model, or other than names, say what to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from transformers import BertConfig, BertModel

import pal_adapters as pa
import pal_adapters.multitask as mt
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


ROWS = datasets.Dataset.from_dict({"text": ["a", "b"] * 5, "label": [0, 1] * 5})
HEADS = {"a": mt.HeadConfig("single_label", 2)}


class Tokenizer:
    """What a collator reads of a tokenizer."""

    padding_side, pad_token_id = "right", 0


OF_TASKS: dict[str, Callable[[Any], Any]] = {
    "head": lambda value: mt.Route(value),
    "weight": lambda value: mt.Route("a", weight=value),
    "regression": lambda value: mt.UncertaintySelector(regression=value),
    "sizes": lambda value: mt.MultiTaskBatchSampler(value, 2),
    "epoch": lambda value: mt.annealed_alpha(value, 3),
    "epochs": lambda value: mt.annealed_alpha(1, value),
    "alpha": lambda value: mt.task_probabilities([3, 4], value),
    "train_size": lambda value: mt.load_toy_task("sentiment", train_size=value),
    "test_size": lambda value: mt.load_toy_task("sentiment", test_size=value),
    "seed": lambda value: mt.load_toy_task("sentiment", seed=value),
    "model": lambda value: mt.add_adapter(value, "a", None),
    "adapter": lambda value: mt.Route("a", adapter=value),
    "output_dir": mt.last_checkpoint,
    "split_columns": lambda value: mt.train_dev_split(ROWS, split_columns=value),
    "tokenizer": lambda value: mt.MultiTaskCollator(value, HEADS),
    "heads": lambda value: mt.MultiTaskCollator(Tokenizer(), {"a": value}),
    "pad_to_multiple_of": lambda value: mt.MultiTaskCollator(Tokenizer(), HEADS, pad_to_multiple_of=value),
    "features": lambda value: mt.MultiTaskCollator(Tokenizer(), HEADS)(value),
    "tasks": mt.ConcatTasks,
    "task": lambda value: mt.EncodedTask(value, ROWS, Tokenizer(), 16),
    "directory": mt.TaskHeads.from_pretrained,
}
OF_A_TASK_HEADS: dict[str, Callable[[mt.TaskHeads, Any], Any]] = {
    "config": lambda model, value: mt.add_adapter(model.backbone, "a", value),
    "tasks": lambda model, value: model.prepare_training(value),
    "base": lambda model, value: model.prepare_training(base=value),
    "shared": lambda model, value: model.prepare_training(shared=value),
    "task": lambda model, value: model.for_task(value),
    "directory": lambda model, value: model.restore(value),
}
VALUES = [-1, True, float("nan"), "", b"x", [None], object, (1, "a")]


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("argument", OF_TASKS)
def test_arguments_of_multitask(argument: str, value: Any) -> None:
    with pytest.raises(pa.ConfigError, match=rf"{argument}(=|\[| is)"):
        OF_TASKS[argument](value)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("argument", OF_A_TASK_HEADS)
def test_arguments_of_task_heads(argument: str, value: Any) -> None:
    if value is True and argument in ("base", "shared"):
        return
    if argument == "config":
        pytest.importorskip("adapters")
    sizes = dict(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = mt.TaskHeads(BertModel(BertConfig(**sizes)))
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(pa.PalAdaptersError, match=rf"{argument}(=|\[| is)|task .* is not there"):
        OF_A_TASK_HEADS[argument](model, value)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_tasks_are_names() -> None:
    peft = pytest.importorskip("peft")
    sizes = dict(vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = peft.get_peft_model(BertModel(BertConfig(**sizes)), pa.CAMTLPeftConfig(tasks=["a", "b"]))
    for tasks in ("a", 3):
        with pytest.raises(pa.ConfigError, match=f"tasks={tasks!r} is not allowed: pass a list of names"):
            pa.train_tasks(model, tasks)  # type: ignore[arg-type]
    with pytest.raises(pa.ConfigError, match="adapter_name=3 is not allowed"):
        pa.add_task(model, "c", 3)  # type: ignore[arg-type]
