"""Tiny base models, bare or with an adapter for each task, in every host that is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel

import pal_adapters
from pal_adapters.multitask import add_adapter

TASKS = ("rte", "stsb", "copa", "ner", "qa", "topics")
HOSTS = ["none"]
HOSTS += [h for h, config in (("adapters", "PALConfig"), ("peft", "PALPeftConfig")) if config in pal_adapters.__all__]


def backbone(folder: str, host: str, names: tuple[str, ...] = TASKS) -> Any:
    """A model from disk with a PAL for each name, all weights of which are random."""
    torch.manual_seed(1)
    model = AutoModel.from_pretrained(folder)
    if host == "adapters":
        import adapters

        adapters.init(model)
        for name in names:
            model.add_adapter(name, config=pal_adapters.PALConfig(hidden_size=12))
        model.set_active_adapters(names[0])
    if host == "peft":
        import peft

        first, *rest = names
        config = {"task_type": "FEATURE_EXTRACTION", "hidden_size": 12}
        model = peft.get_peft_model(model, pal_adapters.PALPeftConfig(**config), adapter_name=first)
        for name in rest:
            model.add_adapter(name, pal_adapters.PALPeftConfig(**config))
    randomise(model)
    return model.eval()


def network(folder: str, host: str, **options: Any) -> Any:
    """A model from disk with the CA-MTL network `net`, which has these options."""
    config = pal_adapters.CAMTLConfig if host == "adapters" else pal_adapters.CAMTLPeftConfig
    return add_adapter(AutoModel.from_pretrained(folder), "net", config(**options))


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pal" in name or "shared_parameters" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
