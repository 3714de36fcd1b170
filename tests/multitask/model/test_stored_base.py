"""Adapters that train the base model store it once in the folder of a `TaskHeads`, and in copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import HOSTS
from torch import Tensor, nn
from transformers import AutoModel

import pal_adapters
from pal_adapters.multitask import HeadConfig, StorageError, TaskHeads
from pal_adapters.multitask.model.saving import copy_saved
from tests.hosts.base_folders import bases, check_stored_once

IDS = torch.arange(4, 24).view(4, 5)
NAMES = ("rte", "stsb", "copa")
LOADED_HOSTS = [host for host in HOSTS if host != "none"]


def joint(folder: str, host: str, names: tuple[str, ...] = NAMES) -> TaskHeads:
    """A model with an adapter for each name that trains the base, every weight of which has moved."""
    base: Any = AutoModel.from_pretrained(folder)
    if host == "adapters":
        import adapters

        adapters.init(base)
        for name in names:
            base.add_adapter(name, config=pal_adapters.PALConfig(hidden_size=12, train_base=True))
    else:
        import peft

        config = {"task_type": "FEATURE_EXTRACTION", "hidden_size": 12, "train_base": True}
        for number, name in enumerate(names):
            one = pal_adapters.PALPeftConfig(**config)
            base = base.add_adapter(name, one) or base if number else peft.get_peft_model(base, one, adapter_name=name)
    model = TaskHeads(base)
    for name in names:
        model.add(name, HeadConfig("single_label", 2), adapter=name)
    model.prepare_training(base=True)
    move(model, 1)
    return model.eval()


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def logits(model: TaskHeads) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: model(task_ids=name, input_ids=IDS).logits[name] for name in model.routes}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("host", LOADED_HOSTS)
@pytest.mark.parametrize("first", ["rte", "default"])
def test_stored_once(tiny_encoder: str, host: str, first: str, tmp_path: Path) -> None:
    names = (first, *NAMES[1:])
    saved, copied = tmp_path / "saved", tmp_path / "copied"
    places = [Path() if host == "peft" and name == "default" else Path(name) for name in names]
    model = joint(tiny_encoder, host, names)
    model.save_pretrained(saved, checkpoint=True)
    check_stored_once(saved / place for place in places)
    move(model, 2)
    expected = logits(model)
    model.save_pretrained(saved, checkpoint=True)
    check_stored_once(saved / place for place in places)  # nothing of the first save is left
    copy_saved(saved, copied)
    check_stored_once(copied / place for place in places)
    for folder in (saved, copied):
        assert same(logits(TaskHeads.from_pretrained(folder)), expected)
        assert same(logits(TaskHeads.from_pretrained(folder, AutoModel.from_pretrained(tiny_encoder))), expected)
    move(model, 3)
    model.restore(saved)
    assert same(logits(model), expected)
    shutil.rmtree(saved)
    assert same(logits(TaskHeads.from_pretrained(copied)), expected)
    for place in places:
        for path in bases(copied / place):
            path.unlink()
    with pytest.raises(StorageError, match=r"base-[0-9a-f]{64}\.safetensors is missing"):
        TaskHeads.from_pretrained(copied)


@pytest.mark.parametrize("host", LOADED_HOSTS)
def test_a_link_out_of_the_folder(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    joint(tiny_encoder, host).save_pretrained(tmp_path / "saved")
    path = bases(tmp_path / "saved" / "rte")[0]
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    with pytest.raises(StorageError, match=f"{path.name} leads out of its folder"):
        TaskHeads.from_pretrained(tmp_path / "saved")
