"""What the model of a run needs for its tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from backbones import HOSTS, backbone
from tiny_tasks import make_tasks
from transformers import AutoTokenizer

from pal_adapters.multitask import MultiTaskTrainer, MultiTaskTrainingArguments, TaskHeads


@pytest.mark.parametrize("host", HOSTS[1:])
def test_adapters_that_rest(tiny_encoder: str, tmp_path: Path, host: str) -> None:
    names = ("rte", "stsb")
    arguments = MultiTaskTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    model = TaskHeads(backbone(tiny_encoder, host, names))
    model.backbone.train_adapter("rte") if host == "adapters" else model.backbone.set_adapter("rte")
    made = MultiTaskTrainer(model, arguments, make_tasks(*names), processing_class=tokenizer)
    made.evaluate()  # for which nothing has to train
    with pytest.warns(UserWarning, match=r"task 'stsb': its adapter \(stsb\) is frozen. Call") as seen:
        made.train()
    assert len(seen) == 1
    model.prepare_training()
    MultiTaskTrainer(model, arguments, make_tasks(*names), processing_class=tokenizer).train()
