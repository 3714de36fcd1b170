"""Tiny models, one small config of each method, and helpers that many tests share."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import adapters
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from tests.methods import RECORDS, names

Run = Callable[..., Tensor]
SMALL: dict[str, Any] = {name: RECORDS[name].config("adapters") for name in names("adapters")}


def tiny_config(**changes: Any) -> BertConfig:
    settings = dict(vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32)
    return BertConfig(**{**settings, **changes})


def fresh(path: pathlib.Path, model_class: Any = BertModel) -> nn.Module:
    """A model read from disk, initialised for `adapters`, in evaluation mode."""
    model = model_class.from_pretrained(path).eval()
    adapters.init(model)
    return model


def randomise(model: nn.Module, *names: str, std: float = 0.2) -> None:
    """Random weights in every tensor of adapters that may start as the identity."""
    for name in names:
        for modules in model.get_adapter(name).values():
            for module in modules.values():
                for parameter in module.parameters():
                    nn.init.normal_(parameter, std=std)


def with_adapters(plain: nn.Module, configs: Mapping[str, Any], *, seed: int) -> nn.Module:
    """A copy of a model with adapters of random weights."""
    model = copy.deepcopy(plain)
    for name, config in configs.items():
        model.add_adapter(name, config=config)
    torch.manual_seed(seed)
    randomise(model, *configs)
    return model


def add(model: nn.Module, name: str, method: str) -> None:
    """An adapter of `SMALL` with random weights."""
    model.add_adapter(name, config=SMALL[method])
    randomise(model, name)


def output(model: nn.Module, batch: dict[str, Tensor], setup: Any = "keep", **more: Any) -> Tensor:
    """`last_hidden_state` with a setup, or with the active one."""
    if setup != "keep":
        model.set_active_adapters(setup)
    with torch.no_grad():
        return model(**batch, **more).last_hidden_state


def hidden(model: nn.Module, batch: dict[str, Tensor], setup: Any) -> Tensor:
    """The base model's output, with or without a head."""
    model.set_active_adapters(setup)
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states[-1]


def parameters_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """All parameters of an adapter, tied projections once."""
    parts = (f"pal_adapters.{name}.", f"shared_parameters.{name}.")
    return {n: p for n, p in model.named_parameters() if any(part in n for part in parts)}
