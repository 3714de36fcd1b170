"""A run of one network whose half of the base trains in place ends where it does with copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import HOSTS, network
from tiny_tasks import make_tasks
from torch import Tensor
from transformers import AutoTokenizer

from pal_adapters.multitask import MultiTaskTrainer, MultiTaskTrainingArguments, TaskHeads

NAMES = ("rte", "stsb")


def trainer(encoder: str, host: str, weights: str, place: Path, **more: Any) -> MultiTaskTrainer:
    torch.manual_seed(1)
    base = network(encoder, host, tasks=list(NAMES), base_weights=weights)
    model, tasks = TaskHeads(base), make_tasks(*NAMES)
    torch.manual_seed(2)
    for task in tasks:
        model.add(task.name, task.head_config(), adapter="net")
    model.prepare_training()
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 3e-3, "weight_decay": 0.1, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 1, "save_strategy": "steps",
        "save_steps": 2, **more,
    }  # fmt: skip
    return MultiTaskTrainer(
        model,
        MultiTaskTrainingArguments(output_dir=str(place), **arguments),
        tasks,
        processing_class=AutoTokenizer.from_pretrained(encoder),
    )


def logits(model: TaskHeads) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.eval()(task_ids=["rte", "stsb"] * 2, input_ids=torch.arange(5, 25).view(4, 5)).logits


@pytest.mark.parametrize("host", [host for host in HOSTS if host != "none"])
def test_runs(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    ends = {}
    for weights in ("copies", "in_place"):
        made = trainer(tiny_encoder, host, weights, tmp_path / weights)
        start = logits(made.model)
        made.train()
        ends[weights] = logits(made.model)
        assert not torch.allclose(start["rte"], ends[weights]["rte"], atol=1e-3)
        assert not (tmp_path / weights / "checkpoint-2" / "base.model").exists()
    for task in NAMES:
        torch.testing.assert_close(ends["in_place"][task], ends["copies"][task])
    resumed = trainer(tiny_encoder, host, "in_place", tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "in_place" / "checkpoint-2"))
    for task, expected in logits(resumed.model).items():
        torch.testing.assert_close(expected, ends["in_place"][task])
    best = trainer(
        tiny_encoder, host, "in_place", tmp_path / "best", eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / "best" / "checkpoint-2")  # the loss falls
    half = TaskHeads.from_pretrained(tmp_path / "best" / "checkpoint-2")
    assert all(torch.equal(value, logits(half)[task]) for task, value in logits(best.model).items())
    assert not torch.allclose(logits(half)["rte"], ends["in_place"]["rte"], atol=1e-4)
