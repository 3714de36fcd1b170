"""Sentence-transformers and SetFit: adapters inside the first module of a sentence encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra clients")

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from .conftest import assert_only_the_adapter_moved, base_weights

pytestmark = pytest.mark.clients

TEXTS = ["it is good", "it was not in", "some have it"]


def encoder_of(folder: str) -> SentenceTransformer:
    first = Transformer(folder, max_seq_length=32)
    return SentenceTransformer(modules=[first, Pooling(first.get_word_embedding_dimension())], device="cpu")


def test_two_data_sets(config: Any, encoder: str, tmp_path: Path) -> None:
    model = encoder_of(encoder)
    before = model.encode(TEXTS)
    model.add_adapter(config())
    np.testing.assert_allclose(model.encode(TEXTS), before, atol=1e-6)  # each starts as the identity
    frozen = base_weights(model)
    pairs = Dataset.from_dict({"anchor": ["it is good", "it was not"] * 4, "positive": ["all good", "was not in"] * 4})
    scored = Dataset.from_dict({"one": ["it is"] * 8, "two": ["has it", "some are"] * 4, "score": [0.0, 1.0] * 4})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path), max_steps=6, learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True,
            report_to="none", save_strategy="no", logging_steps=1,
        ),
        train_dataset={"pairs": pairs, "scored": scored},
        loss={
            "pairs": losses.MultipleNegativesRankingLoss(model),
            "scored": losses.CosineSimilarityLoss(model),
        },
    )  # fmt: skip
    trainer.train()
    trained = model.encode(TEXTS)
    assert np.abs(trained - before).max() > 1e-3
    assert_only_the_adapter_moved(model, frozen)

    model.save_pretrained(str(tmp_path / "saved"))
    again = encoder_of(encoder)
    again.load_adapter(str(tmp_path / "saved"))
    np.testing.assert_allclose(again.encode(TEXTS), trained, atol=1e-6)


def test_setfit(config: Any, encoder: str, tmp_path: Path) -> None:
    setfit = pytest.importorskip("setfit", reason="needs the extra clients")
    body = encoder_of(encoder)
    body.add_adapter(config())
    frozen = base_weights(body)
    model = setfit.SetFitModel(body, model_head=setfit.SetFitHead(24, 2, device="cpu"), labels=["no", "yes"])
    data = Dataset.from_dict({"text": ["it is good", "was not in", "all good", "not it"], "label": [1, 0, 1, 0]})
    trainer = setfit.Trainer(
        model=model,
        args=setfit.TrainingArguments(str(tmp_path), max_steps=4, batch_size=2, report_to="none", save_strategy="no"),
        train_dataset=data,
    )
    trainer.train()
    assert set(model.predict(["it is good", "was not in"])) <= {"no", "yes"}
    assert_only_the_adapter_moved(body, frozen)
