"""Tiny models and a tokenizer in folders, as client libraries load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import pal_adapters as pa
from tests.multitask.tiny_encoder import save_tiny_encoder

CONFIGS: dict[str, Any] = {
    "lora": lambda **options: LoraConfig(r=4, **options),
    "pal": lambda **options: pa.PALPeftConfig(hidden_size=12, **options),
    "houlsby": lambda **options: pa.HoulsbyPeftConfig(hidden_size=8, **options),
    "low_rank": lambda **options: pa.LowRankPeftConfig(hidden_size=8, **options),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    """Makes a config; first that of the control."""
    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT and its tokenizer."""
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and a tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder: Path = tmp_path_factory.mktemp("decoder")
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_encoder(folder))
    tokenizer.add_special_tokens({"eos_token": "[SEP]", "bos_token": "[CLS]"})
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder)
    return str(folder)


def base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights that are frozen."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def assert_only_the_adapter_moved(model: torch.nn.Module, frozen: dict[str, torch.Tensor]) -> None:
    """Of a model that was trained: `frozen`, copied before, is as it was."""
    for name, parameter in model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(parameter.detach(), frozen[name], rtol=0, atol=0, msg=name)
