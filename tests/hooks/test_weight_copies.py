"""Copies of weights that the `forward` of another module reads."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import torch
import transformers
from peft import get_peft_model
from torch import nn

from pal_adapters import CAMTLPeftConfig
from pal_adapters.hooks.weight_copies import readers
from tests.zoo import HOST_WARNINGS

pytestmark = HOST_WARNINGS


def test_readers() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert readers(nn.Sequential(attention, nn.Linear(8, 8))) == {attention.out_proj: attention}


def test_the_pooling_attention_of_siglip() -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36, image_size=8, patch_size=4
    )
    config_of_tasks = CAMTLPeftConfig(tasks=["a", "b"], bottleneck="none")
    model = get_peft_model(transformers.SiglipVisionModel(config), config_of_tasks).eval()
    pixels, tasks = torch.randn(2, 3, 8, 8), ["a", "b"]
    copies = {n: p for n, p in model.named_parameters() if ".outer." in n and "head__attention" in n}
    assert len(copies) == 4
    model(pixels, task_ids=tasks).pooler_output.square().sum().backward()
    assert [name for name, copy in copies.items() if copy.grad is None or not copy.grad.any()] == []
