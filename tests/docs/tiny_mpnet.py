"""An MPNet of two tiny layers with random weights."""

from __future__ import annotations

import torch


def save_tiny_mpnet(folder: str) -> None:
    from transformers import MPNetConfig, MPNetModel

    torch.manual_seed(0)
    config = MPNetConfig(
        vocab_size=60,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    MPNetModel(config).save_pretrained(folder)
