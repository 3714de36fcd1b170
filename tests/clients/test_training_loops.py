"""Lightning, Optuna's search and pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

from .conftest import assert_only_the_adapter_moved, base_weights

pytestmark = pytest.mark.clients

TEXTS = ["it is good", "it was not in", "some have it", "all are good"]
LABELS = [1, 0, 0, 1]


def classifier(folder: str, config: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return get_peft_model(base, config(task_type="SEQ_CLS"))


def batch(folder: str) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {**tokenizer(TEXTS, padding=True, return_tensors="pt"), "labels": torch.tensor(LABELS)}


def test_lightning_trains_as_a_plain_loop_does(config: Any, encoder: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs the extra clients")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(encoder, config).eval()

        def training_step(self, given: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.model(**given).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    module, plain = Module(), classifier(encoder, config).eval()
    frozen = base_weights(module.model)
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch(encoder)] * 3, batch_size=None))
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        plain(**batch(encoder)).loss.backward()
        optimizer.step()
    assert_only_the_adapter_moved(module.model, frozen)
    for (name, found), expected in zip(module.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)

    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "whole.ckpt")
    with torch.no_grad():
        given = batch(encoder)
        torch.testing.assert_close(again.model.eval()(**given).logits, module.model.eval()(**given).logits)


def test_optuna_searches_a_rate(config: Any, encoder: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the extra clients")
    given = batch(encoder)
    rows = [{name: tensor[index] for name, tensor in given.items()} for index in range(len(TEXTS))]
    trainer = Trainer(
        model_init=lambda: classifier(encoder, config),
        args=TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
            save_strategy="no", eval_strategy="steps", eval_steps=2, disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        backend="optuna", n_trials=2, direction="minimize",
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)},
    )  # fmt: skip
    assert 1e-3 <= best.hyperparameters["learning_rate"] <= 1e-1


def test_pipelines_compute_what_the_model_does(config: Any, encoder: str) -> None:
    model = classifier(encoder, config).eval()
    classify = pipeline(
        "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(encoder), top_k=None
    )
    with torch.no_grad():
        given = batch(encoder)
        expected = model(**given).logits.softmax(-1)
    for found, row in zip(classify(TEXTS), expected, strict=True):
        scores = {entry["label"]: entry["score"] for entry in found}
        torch.testing.assert_close(torch.tensor([scores["LABEL_0"], scores["LABEL_1"]]), row, rtol=0, atol=1e-5)
