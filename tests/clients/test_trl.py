"""TRL: supervised fine-tuning, and preference optimisation against the model with its adapter disabled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra clients")

import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import pal_adapters as pa

from .conftest import assert_only_the_adapter_moved, base_weights

pytestmark = pytest.mark.clients

ARGUMENTS = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True}
ARGUMENTS |= {"report_to": "none", "logging_steps": 1, "save_strategy": "no", "bf16": False}
PAIRS = {"prompt": ["the film was"] * 8, "chosen": [" good"] * 8, "rejected": [" not good"] * 8}


def test_supervised_fine_tuning(config: Any, decoder: str, tmp_path: Path) -> None:
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(decoder),
        args=trl.SFTConfig(str(tmp_path), max_length=32, **ARGUMENTS),
        train_dataset=Dataset.from_dict({"text": ["the film was good"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(decoder),
        peft_config=config(task_type="CAUSAL_LM"),
    )
    frozen = base_weights(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_only_the_adapter_moved(trainer.model, frozen)

    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "saved").eval()
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, trainer.model.eval()(tokens).logits, rtol=0, atol=1e-6)


def test_preferences(config: Any, decoder: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(decoder).eval()
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        expected = base(tokens).logits
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(decoder),
        args=trl.DPOConfig(str(tmp_path), max_length=32, **ARGUMENTS),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(decoder),
        peft_config=config(task_type="CAUSAL_LM"),
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-6)  # no adapter moved anything yet
    assert margins[-1] > 0
    model = trainer.model.eval()
    with torch.no_grad(), model.disable_adapter():  # the reference of the loss
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-6)


def test_preferences_with_a_trained_base_are_rejected(decoder: str, tmp_path: Path) -> None:
    with pytest.raises(pa.UnsupportedError, match="train_base"):
        trl.DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(decoder),
            args=trl.DPOConfig(str(tmp_path), max_length=32, **ARGUMENTS),
            train_dataset=Dataset.from_dict(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(decoder),
            peft_config=pa.PALPeftConfig(hidden_size=12, task_type="CAUSAL_LM", train_base=True),
        ).train()
