"""Bases in fewer bits: bitsandbytes and torchao, on a CPU. The adapter trains in full precision on top of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.clients


def four_bits(folder: str) -> Any:
    pytest.importorskip("bitsandbytes", reason="needs the extra clients")
    from transformers import BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def eight_bits(folder: str) -> Any:
    pytest.importorskip("torchao", reason="needs the extra clients")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


@pytest.fixture(params=[four_bits, eight_bits], ids=["bitsandbytes", "torchao"])
def load(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    return request.param


def test_trains_and_reloads(config: Any, load: Callable[[str], Any], decoder: str) -> None:
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        before = load(decoder).eval()(tokens).logits.float()
        added = get_peft_model(load(decoder), config(task_type="CAUSAL_LM")).eval()
        torch.testing.assert_close(added(tokens).logits.float(), before, rtol=0, atol=1e-5)
    # bitsandbytes packs weights for inference at the first call in evaluation mode, and computes no gradients then.
    model = get_peft_model(load(decoder), config(task_type="CAUSAL_LM")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.Adam(trained, lr=5e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        after = model(tokens).logits.float()
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens).logits.float(), before, rtol=0, atol=1e-5)

    again = get_peft_model(load(decoder), config(task_type="CAUSAL_LM")).eval()
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits.float(), after, rtol=0, atol=1e-5)
