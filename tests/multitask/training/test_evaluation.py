"""`eval_<task>_loss` is the mean over all items for any batch size: recomputed one example at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbones import backbone
from tiny_tasks import make_task
from transformers import AutoTokenizer, GPT2Config, GPT2Model

from pal_adapters.multitask import MultiTaskTrainer, MultiTaskTrainingArguments, TaskHeads

KINDS = [
    "single_label", "multi_label", "regression", "token_tagging", "span_qa", "multiple_choice", "language_modeling"
]  # fmt: skip


def make(folder: str, output: Path, kind: str, size: int, *, loss: Any = None) -> MultiTaskTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    if kind == "language_modeling":
        base: Any = GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32))
    else:
        base = backbone(folder, "none")
    model = TaskHeads(base)
    task = make_task(kind, "own", (4, 11), loss=loss)
    model.add("own", task.head_config(), loss=loss)
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    arguments = MultiTaskTrainingArguments(
        str(output), per_device_eval_batch_size=size, use_cpu=True, report_to=[], disable_tqdm=True, max_length=16
    )
    return MultiTaskTrainer(model, arguments, [task], processing_class=tokenizer)


def by_hand(trainer: MultiTaskTrainer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits and labels of each example, computed one at a time."""
    rows, model = trainer.eval_dataset["own"], trainer.model.eval()
    logits, labels = [], []
    for row in rows:
        batch = trainer.collator([row])
        labels.append(batch.pop("labels")["own"][0])
        with torch.no_grad():
            logits.append(model(**batch).logits["own"][0])
    return logits, labels


def mean_loss(kind: str, logits: list[torch.Tensor], labels: list[torch.Tensor]) -> float:
    total, count = 0.0, 0
    for scored, label in zip(logits, labels, strict=True):
        if kind == "language_modeling":
            scored, label = scored[:-1], label[1:]
        if kind in ("token_tagging", "language_modeling"):
            total += float(F.cross_entropy(scored, label.long(), ignore_index=-100, reduction="sum"))
            count += int((label != -100).sum())
            continue
        count += 1
        if kind == "regression":
            total += float((scored - label) ** 2)
        elif kind == "multi_label":
            total += float(F.binary_cross_entropy_with_logits(scored, label))
        elif kind == "span_qa":
            total += float(F.cross_entropy(scored.T, label, reduction="mean"))
        else:
            total += float(F.cross_entropy(scored, label))
    return total / count


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_the_batch_size(tiny_encoder: str, tmp_path: Path, kind: str) -> None:
    for size in (1, 3, 8):
        trainer = make(tiny_encoder, tmp_path, kind, size)
        found = trainer.evaluate()
        expected = mean_loss(kind, *by_hand(trainer))
        assert found["eval_own_loss"] == pytest.approx(expected, rel=1e-4), size
        assert found["eval_loss"] == found["eval_own_loss"]
        output = trainer.predict(trainer.eval_dataset["own"])
        assert output.metrics["test_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["single_label", "token_tagging", "span_qa"])
def test_a_custom_loss_is_over_all_examples(tiny_encoder: str, tmp_path: Path, kind: str) -> None:
    weight = torch.tensor([1.0, 5.0, 3.0])

    def weighted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if kind == "span_qa":  # a mean that is no mean of batch means
            return F.cross_entropy(logits[..., 0], labels[:, 0]).square()
        classes = logits.shape[-1]
        return F.cross_entropy(
            logits.reshape(-1, classes), labels.flatten(), weight=weight[:classes], ignore_index=-100
        )

    for size in (1, 3, 8):
        trainer = make(tiny_encoder, tmp_path, kind, size, loss=weighted)
        logits, labels = by_hand(trainer)
        if kind == "span_qa":
            each = [
                float(F.cross_entropy(scored[:, 0], label[0])) for scored, label in zip(logits, labels, strict=True)
            ]
            expected = float(np.mean(each)) ** 2
        else:
            flat = torch.cat([scored.reshape(-1, scored.shape[-1]) for scored in logits])
            true = torch.cat([label.flatten() for label in labels])
            own = F.cross_entropy(flat, true, reduction="none", ignore_index=-100)
            weights = weight[true.clamp(min=0)] * (true != -100)
            expected = float((own * weights).sum() / weights.sum())
        assert trainer.evaluate()["eval_own_loss"] == pytest.approx(expected, rel=1e-4), size


def test_a_custom_loss_over_ignored_labels_is_zero(tiny_encoder: str, tmp_path: Path) -> None:
    def mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    trainer = make(tiny_encoder, tmp_path, "token_tagging", 3, loss=mean)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.full((1, 3), -100)}
    output = trainer.model.train()(task_ids="own", **inputs)
    output.loss.backward()
    assert output.loss.item() == 0
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
