"""What a `Predictor` should answer, computed with the base model and the heads one request at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from backbones import backbone
from tiny_tasks import NAMES, make_tasks, text
from torch import Tensor
from transformers import AutoTokenizer

from pal_adapters.multitask import Predictor, Task, TaskHeads

REQUESTS: list[dict[str, Any]] = [
    {"task": "rte", "first": text(1), "second": text(2)},
    {"task": "ner", "tokens": text(3).split()},
    {"task": "stsb", "first": text(4, 7), "second": text(5)},
    {"task": "copa", "first": text(6), "second": text(7, 9), "third": text(8)},
    {"task": "qa", "question": text(9, 2), "context": text(10, 12)},
    {"task": "rte", "first": text(11, 1), "second": text(12, 12)},
    {"task": "topics", "first": text(13), "second": text(14)},
    {"task": "ner", "tokens": text(15, 9).split()},
]


def made(folder: str, host: str, names: tuple[str, ...] = tuple(NAMES)) -> tuple[TaskHeads, list[Task]]:
    """A model with a task of every kind, and heads with large weights for clear differences."""
    tasks = make_tasks(*names)
    model = TaskHeads(backbone(folder, host, names))
    torch.manual_seed(3)
    for task in tasks:
        model.add(task.name, task.head_config())
        head = model.head(task.name).linear
        assert head is not None
        torch.nn.init.normal_(head.weight, std=0.5)
        torch.nn.init.normal_(head.bias, std=0.5)
    model.prepare_training()
    return model.eval(), tasks


def saved(folder: str, host: str, place: Path, **given: Any) -> Predictor:
    """A predictor read from a new folder."""
    model, tasks = made(folder, host)
    described = [task.describe(max_length=64) for task in tasks]
    model.save_pretrained(place, processing_class=AutoTokenizer.from_pretrained(folder), tasks=described)
    return Predictor.from_pretrained(place, **given)


def hidden(model: TaskHeads, task: str, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states of the model's backbone with the adapter of a task alone, `[r, n, d]`."""
    bare: Any = model.backbone
    if hasattr(bare, "peft_config"):
        bare.set_adapter(task)
        bare = bare.get_base_model()
    elif hasattr(bare, "adapters_config"):
        bare.set_active_adapters(task)
    with torch.no_grad():
        return bare(**inputs).last_hidden_state


def plain_logits(model: TaskHeads, tokenizer: Any, request: dict[str, Any]) -> Tensor:
    """The logits of one request: `[c]`, `[choices]`, or `[n, c]` for tags and answers."""
    task = request["task"]
    texts = [value for key, value in request.items() if key != "task"]
    if task == "copa":
        inputs = tokenizer([texts[0]] * 2, texts[1:], return_tensors="pt", padding=True)
    elif task == "ner":
        inputs = tokenizer(texts[0], is_split_into_words=True, return_tensors="pt")
    else:
        inputs = tokenizer(*texts, return_tensors="pt")
    states = hidden(model, task, dict(inputs))
    linear = model.head(task).linear
    assert linear is not None
    if task in ("ner", "qa"):
        return (states @ linear.weight.T + linear.bias)[0].detach()
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    pooled = (states * mask).sum(1) / mask.sum(1)
    return (pooled @ linear.weight.T + linear.bias).flatten().detach()
