"""Tiny models of the model classes of `adapters`."""

from __future__ import annotations

import copy
import functools

import adapters
import torch
from torch import Tensor, nn
from transformers import BertConfig, CLIPTextModel, CLIPVisionModel, EncoderDecoderConfig, EncoderDecoderModel

from tests import zoo

from .tiny import tiny_config

NAMES = (
    "albert", "bart", "beit", "bert-generation", "clip", "clip-text", "clip-vision", "deberta", "deberta-v2",
    "distilbert", "electra", "encoder-decoder", "gemma2", "gemma3", "gpt2", "gptj", "llama", "mbart", "mistral",
    "modernbert", "mt5", "phi", "plbart", "qwen2", "qwen3", "roberta", "t5", "vit", "whisper", "xlm-roberta", "xmod",
    "xmod-pre",
)  # fmt: skip


@functools.cache
def _plain(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "encoder-decoder":
        parts = (tiny_config(num_hidden_layers=2), BertConfig(**{**tiny_config().to_dict(), "num_hidden_layers": 2,
                 "is_decoder": True, "add_cross_attention": True}))  # fmt: skip
        model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*parts))
        zoo.randomise(model)
        return model.eval()
    if name.startswith("clip-"):
        whole = zoo.BY_NAME["clip"].build()
        part = whole.config.text_config if name == "clip-text" else whole.config.vision_config
        model = (CLIPTextModel if name == "clip-text" else CLIPVisionModel)(part)
        zoo.randomise(model)
        return model.eval()
    # The host cannot run X-MOD without a norm for its language adapters.
    changes = {"adapter_reuse_layer_norm": True} if name.startswith("xmod") else {}
    return (zoo.ALBERT if name == "albert" else zoo.BY_NAME[name]).build(**changes)


def plain(name: str) -> nn.Module:
    return copy.deepcopy(_plain(name))


def init(model: nn.Module) -> None:
    """`adapters.init`, which adds a random bias to a fused projection without one (DeBERTa, ModernBERT)."""
    before = {name for name, _ in model.named_parameters()}
    adapters.init(model)
    for name, parameter in model.named_parameters():
        if name not in before and name.endswith(("in_proj.bias", "Wqkv.bias")):
            nn.init.zeros_(parameter)


def inputs(name: str) -> dict[str, Tensor]:
    if name == "albert":
        return zoo.ALBERT.inputs()
    if name == "encoder-decoder":
        return zoo.BY_NAME["bert"].inputs() | {"decoder_input_ids": torch.randint(4, 40, (3, 5), generator=seeded(2))}
    if name.startswith("clip-"):
        chosen = ("input_ids", "attention_mask") if name == "clip-text" else ("pixel_values",)
        return {key: value for key, value in zoo.BY_NAME["clip"].inputs().items() if key in chosen}
    return zoo.BY_NAME[name].inputs()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
