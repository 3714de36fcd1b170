"""Sources in PEFT on a model for which it has no default modules: added, saved, loaded and combined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from pal_adapters.cli.combining import HOSTS
from tests.docs.tiny_mpnet import save_tiny_mpnet


def test_lora_on_a_model_without_defaults(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_tiny_mpnet(str(tmp_path / "mpnet"))
    ids = torch.arange(5, 19).view(2, 7)
    sources = tmp_path / "sources"
    found = {}
    for seed, name in enumerate(("one", "two")):
        calls = HOSTS["peft"](AutoModel.from_pretrained(tmp_path / "mpnet"), 16.0, sources)
        setup = calls.add(name)
        torch.manual_seed(seed)
        for weight_name, weight in calls.model.named_parameters():
            if "lora_B" in weight_name:
                torch.nn.init.normal_(weight, std=0.3)
        calls.save(setup, sources / name)
        found[name] = calls.model.eval()(input_ids=ids).last_hidden_state
    for name, expected in found.items():
        calls = HOSTS["peft"](AutoModel.from_pretrained(tmp_path / "mpnet"), 16.0, sources)
        calls.load(name, sources / name)
        torch.testing.assert_close(calls.model.eval()(input_ids=ids).last_hidden_state, expected)
        # One source with a coefficient of one is that source.
        calls.combine("new", [name], "average")
        torch.testing.assert_close(calls.model.eval()(input_ids=ids).last_hidden_state, expected)
