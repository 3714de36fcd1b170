"""`TaskHeads`: reading a folder onto a backbone, and choosing what trains, are whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import pal_adapters
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.multitask import HeadConfig, TaskHeads
from pal_adapters.multitask.predict.adding import remove_saved_task, whole_change

from .interrupts import stopped

POINTS = int(os.environ.get("PAL_ADAPTERS_INTERRUPTS", "6"))
HOSTS = [h for h, config in (("adapters", "PALConfig"), ("peft", "PALPeftConfig")) if config in pal_adapters.__all__]
hosts = pytest.mark.parametrize("host", HOSTS)


def base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**sizes, intermediate_size=16, max_position_embeddings=16)).eval()


def heads(host: str) -> TaskHeads:
    model = base()
    if host == "adapters":
        import adapters

        adapters.init(model)
        for name in ("rte", "sst"):
            model.add_adapter(name, config=pal_adapters.PALConfig(hidden_size=6, num_heads=2))
    else:
        import peft

        model = peft.get_peft_model(model, pal_adapters.PALPeftConfig(hidden_size=6, num_heads=2), adapter_name="rte")
        model.add_adapter("sst", pal_adapters.PALPeftConfig(hidden_size=6, num_heads=2))
    found = TaskHeads(model)
    for name in ("rte", "sst"):
        found.add(name, HeadConfig("single_label", 2), adapter=name)
    return found.eval()


def picture(model: nn.Module) -> dict[str, Any]:
    backbone: Any = getattr(model, "backbone", model)
    return {
        "modules": [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()],
        "hooks": [[list(m._forward_hooks), list(m._forward_pre_hooks)] for m in model.modules()],
        "tensors": [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        "active": repr(backbone.active_adapters) if hasattr(backbone, "adapters_config") else None,
        "tasks": repr((getattr(model, "routes", None), getattr(model, "described", None))),
        "values": {name: value.clone() for name, value in model.state_dict().items()},
    }


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    values = before["values"].keys() == after["values"].keys() and all(
        torch.equal(value, after["values"][name]) for name, value in before["values"].items()
    )
    return values and all(before[key] == after[key] for key in before if key != "values")


def check(make: Callable[[], nn.Module], change: Callable[[Any], Any]) -> None:
    model = make()
    before = picture(model)
    for _ in stopped(change, model, make(), POINTS):
        assert unchanged(before, picture(model))
    change(model)


@hosts
def test_reading_onto_a_backbone(host: str, tmp_path: Path) -> None:
    heads(host).save_pretrained(tmp_path)
    check(base, lambda model: TaskHeads.from_pretrained(tmp_path, model))


@hosts
def test_choosing_what_trains(host: str) -> None:
    check(lambda: heads(host), lambda model: model.prepare_training(["rte"], base=True))


@hosts
def test_removing_a_task(host: str) -> None:
    check(lambda: heads(host), lambda model: model.remove("rte"))


@hosts
def test_removing_a_task_with_its_adapter(host: str) -> None:
    def remove(model: TaskHeads) -> None:
        with whole_change(model):
            remove_saved_task(model, "rte")

    check(lambda: heads(host), remove)


@hosts
@pytest.mark.parametrize("base", [False, True])
def test_going_back_to_a_checkpoint(host: str, base: bool, tmp_path: Path) -> None:
    other = heads(host)
    other.prepare_training(base=base)
    with torch.no_grad():
        for parameter in filter(lambda one: one.requires_grad, other.parameters()):
            parameter.add_(torch.randn(parameter.shape))
    other.save_pretrained(tmp_path, checkpoint=True)
    model = heads(host)
    before = picture(model)
    for _ in stopped(lambda model: model.restore(tmp_path), model, heads(host), 4 * POINTS):
        assert unchanged(before, picture(model))
        assert not model.base_trained
    model.restore(tmp_path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.base_trained is base


@hosts
def test_a_backbone_that_cannot_be_used(host: str, tmp_path: Path) -> None:
    heads(host).save_pretrained(tmp_path)
    backbone = base()
    backbone.config.is_encoder_decoder = True
    before = picture(backbone)
    with pytest.raises(UnsupportedError, match="an encoder and a decoder"):
        TaskHeads.from_pretrained(tmp_path, backbone)
    assert unchanged(before, picture(backbone))
    with pytest.raises(ConfigError, match="backbone='bert' is not a model"):
        TaskHeads.from_pretrained(tmp_path, "bert")  # type: ignore[arg-type]
