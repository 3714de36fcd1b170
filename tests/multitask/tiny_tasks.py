"""A task of every kind with a few examples, for tests of the Trainer."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from backbones import backbone
from transformers import AutoTokenizer

from pal_adapters.multitask import MultiTaskTrainer, MultiTaskTrainingArguments, Task, TaskHeads

WORDS = ["the", "is", "are", "was", "not", "all", "some", "no", "did", "has", "have", "in", "it"]


def text(number: int, length: int = 4) -> str:
    return " ".join(WORDS[(number * 7 + i * (number % 3 + 1)) % len(WORDS)] for i in range(length + number % 3))


def splits(train: dict[str, list[Any]], validation: dict[str, list[Any]]) -> dict[str, datasets.Dataset]:
    return {"train": datasets.Dataset.from_dict(train), "validation": datasets.Dataset.from_dict(validation)}


def rows(size: int, start: int, **columns: Any) -> dict[str, list[Any]]:
    return {name: [make(start + i) for i in range(size)] for name, make in columns.items()}


def make_task(kind: str, name: str, sizes: tuple[int, int] = (10, 5), **changes: Any) -> Task:
    columns: dict[str, Any]
    given: dict[str, Any] = {}
    if kind == "token_tagging":
        columns = {
            "tokens": lambda i: text(i).split(),
            "tags": lambda i: [(i + k) % 3 for k in range(len(text(i).split()))],
        }
        given = {"label_names": ("O", "B-X", "I-X")}
    elif kind == "span_qa":
        columns = {
            "question": lambda i: text(i, 2),
            "context": lambda i: text(i + 1, 9),
            "answers": lambda i: {"text": [text(i + 1, 9).split()[0]], "answer_start": [0]},
        }
    elif kind == "language_modeling":
        columns = {"text": text}
    else:
        labels = {
            "single_label": lambda i: i % 2,
            "multi_label": lambda i: [i % 3],
            "regression": lambda i: (i % 5) + 0.8,
            "multiple_choice": lambda i: i % 2,
        }
        columns = {"first": text, "second": lambda i: text(i + 3), "label": labels[kind]}
        given = {"text_columns": ("first", "second")}
        if kind in ("single_label", "multi_label"):
            given["num_labels"] = 2 if kind == "single_label" else 3
        if kind == "multiple_choice":
            columns["third"] = lambda i: text(i + 5)
            given["text_columns"] = ("first", "second", "third")
    data = splits(rows(sizes[0], 0, **columns), rows(sizes[1], 100, **columns))
    return Task(name, data, kind=kind, **{**given, **changes})  # type: ignore[arg-type]


NAMES = {
    "rte": "single_label",
    "stsb": "regression",
    "copa": "multiple_choice",
    "ner": "token_tagging",
    "qa": "span_qa",
    "topics": "multi_label",
}


def make_tasks(*names: str, **changes: Any) -> list[Task]:
    return [make_task(NAMES[name], name, (10 + 3 * n, 5), **changes) for n, name in enumerate(names or NAMES)]


def make_trainer(
    folder: str, output: Any, *, host: str = "none", names: tuple[str, ...] = ("rte", "stsb", "copa"), **given: Any
) -> MultiTaskTrainer:
    keys = ("strategy", "batch_selector", "callbacks", "eval_dataset", "train_dataset", "aggregate")
    options = {name: given.pop(name) for name in keys if name in given}
    base = given.pop("base", False)
    tasks = given.pop("tasks", None) or make_tasks(*names)
    model = TaskHeads(backbone(folder, host, tuple(task.name for task in tasks)))
    torch.manual_seed(7)
    for task in tasks:
        model.add(task.name, task.head_config(), weight=task.weight, loss=task.loss)
    model.prepare_training(base=base)
    arguments: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "steps_per_epoch": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
        **given,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return MultiTaskTrainer(
        model, MultiTaskTrainingArguments(**arguments), tasks, processing_class=tokenizer, **options
    )


def losses(trainer: MultiTaskTrainer) -> list[dict[str, float]]:
    """What was logged of the losses, step by step."""
    return [
        {name: value for name, value in entry.items() if name == "step" or "loss" in name}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def without_dropout(trainer: MultiTaskTrainer) -> MultiTaskTrainer:
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # of the fused attention of transformers 4
            module.dropout_prob = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # of the attention of a PAL
            module.dropout = 0.0
    return trainer
