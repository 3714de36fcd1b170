"""Adapters with `train_base` that are saved together store the pretrained weights once; each folder loads alone."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import pytest
import torch
from adapters import AutoAdapterModel, ConfigUnion, SeqBnConfig
from adapters.composition import MultiTask
from adapters.loading import AdapterLoader
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

from pal_adapters import LowRankConfig, PALConfig, StorageError
from tests.hosts.base_folders import DAMAGE, bases, check_stored_once, in_one_file, key_of
from tests.robustness.model_state import changes, state

from .test_training import step, trainer_for
from .tiny import fresh, hidden, randomise

CONFIGS: dict[str, Any] = {
    "sst": PALConfig(hidden_size=12, train_base=True),
    "mnli": PALConfig(hidden_size=12, train_base=True),
    "union": ConfigUnion(LowRankConfig(hidden_size=3, train_base=True), SeqBnConfig(reduction_factor=4)),
    "frozen": LowRankConfig(hidden_size=3),
}
JOINT = ("sst", "mnli", "union")


def trained(path: pathlib.Path, batch: dict[str, Tensor], model_class: Any = BertModel) -> nn.Module:
    model = fresh(path, model_class)
    for name, config in CONFIGS.items():
        model.add_adapter(name, config=config)
    torch.manual_seed(1)
    randomise(model, *CONFIGS)
    model.train_adapter("sst")
    step(model, batch)
    return model.eval()


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: hidden(model, batch, name) for name in CONFIGS}


def save(model: nn.Module, how: str, folder: pathlib.Path, *, safe: bool = True) -> None:
    if how == "setup":
        model.save_adapter_setup(str(folder), MultiTask(*CONFIGS), use_safetensors=safe)
    else:
        model.save_all_adapters(str(folder), use_safetensors=safe)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("how", ["all", "setup"])
@pytest.mark.parametrize("model_class", [BertModel, BertForSequenceClassification])
def test_stored_once_and_loaded(
    model_class: Any, how: str, safe: bool, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    model = trained(base_path, batch, model_class)
    expected = outputs(model, batch)
    save(model, how, tmp_path, safe=safe)
    check_stored_once(tmp_path / name for name in JOINT)
    assert not bases(tmp_path / "frozen")
    for target in (BertModel, BertForSequenceClassification):
        other = fresh(base_path, target)
        for name in CONFIGS:
            info: dict[str, Any] = {}
            other.load_adapter(str(tmp_path / name), use_safetensors=safe, loading_info=info)
            assert info["missing_keys"] == []
        assert all(torch.equal(value, expected[name]) for name, value in outputs(other, batch).items())
    if how == "setup":
        other = fresh(base_path, model_class)
        other.load_adapter_setup(str(tmp_path), use_safetensors=safe)
        assert all(torch.equal(value, expected[name]) for name, value in outputs(other, batch).items())


def test_a_folder_moved_away_loads_alone(
    base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    model = trained(base_path, batch)
    expected = outputs(model, batch)["mnli"]
    save(model, "all", tmp_path / "all")
    shutil.copytree(tmp_path / "all" / "mnli", tmp_path / "alone")
    shutil.rmtree(tmp_path / "all")
    own = load_file(tmp_path / "alone" / "adapter.safetensors")
    base = load_file(bases(tmp_path / "alone")[0])
    key_of(own)
    assert not own.keys() & base.keys()
    assert all(torch.equal(base[name], value) for name, value in model.state_dict().items() if name in base)
    for load_as in ("mnli", "other"):
        other = fresh(base_path)
        other.load_adapter(str(tmp_path / "alone"), load_as=load_as, use_safetensors=True)
        assert torch.equal(hidden(other, batch, load_as), expected)
    in_one_file(tmp_path / "alone", "adapter.safetensors")  # as if it had been saved alone
    other = fresh(base_path)
    other.load_adapter(str(tmp_path / "alone"), use_safetensors=True)
    assert torch.equal(hidden(other, batch, "mnli"), expected)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_base_changes_nothing(
    damage: str, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    change, message = DAMAGE[damage]
    save(trained(base_path, batch), "all", tmp_path)
    change(tmp_path / "sst", "adapter.safetensors")
    model = fresh(base_path)
    model.add_adapter("old", config=LowRankConfig(hidden_size=3), set_active=True)
    before = state(model)
    with pytest.raises(StorageError, match=message):
        model.load_adapter(str(tmp_path / "sst"), use_safetensors=True)
    assert not changes(before, state(model))


def test_saving_again_leaves_no_base_behind(
    base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    model = trained(base_path, batch)
    save(model, "all", tmp_path)
    first = bases(tmp_path / "sst")
    save(model, "all", tmp_path)
    assert bases(tmp_path / "sst") == first
    step(model, batch)
    save(model, "all", tmp_path)
    check_stored_once(tmp_path / name for name in JOINT)
    assert bases(tmp_path / "sst") != first
    expected = outputs(model, batch)
    model.save_adapter(str(tmp_path / "sst"), "sst", use_safetensors=True)
    assert not bases(tmp_path / "sst")
    other = fresh(base_path)
    for name in CONFIGS:
        other.load_adapter(str(tmp_path / name), use_safetensors=True)
    assert all(torch.equal(value, expected[name]) for name, value in outputs(other, batch).items())


def test_tensors_without_their_folder(
    base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    model = trained(base_path, batch)
    save(model, "all", tmp_path)
    tensors = load_file(tmp_path / "sst" / "adapter.safetensors")
    before = state(model)
    with pytest.raises(StorageError, match=r"base-.* beside its file.*: load its folder"):
        AdapterLoader(model).load_from_state_dict(tensors, "sst")
    assert not changes(before, state(model))


def test_flexible_heads(base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path) -> None:
    model = AutoAdapterModel.from_pretrained(base_path).eval()
    for name in ("sst", "mnli"):
        model.add_adapter(name, config=CONFIGS[name])
        model.add_classification_head(name, num_labels=3)
    randomise(model, "sst", "mnli")
    model.train_adapter("sst")
    model.save_all_adapters(str(tmp_path), use_safetensors=True)
    check_stored_once([tmp_path / "sst", tmp_path / "mnli"])
    other = AutoAdapterModel.from_pretrained(base_path).eval()
    for name in ("sst", "mnli"):
        other.load_adapter(str(tmp_path / name), use_safetensors=True)
        for one in (model.eval(), other):
            one.set_active_adapters(name)
            one.active_head = name
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_checkpoints_of_a_trainer(base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path) -> None:
    """Each has the base once, and resuming from one ends where an uninterrupted run does."""

    def run(folder: str, resume: str | None = None) -> dict[str, Tensor]:
        model = fresh(base_path, BertForSequenceClassification)
        for name in ("sst", "mnli"):
            model.add_adapter(name, config=CONFIGS[name])
        torch.manual_seed(1)
        randomise(model, "sst", "mnli")
        model.train_adapter("sst")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer, _ = trainer_for(model, tmp_path / folder)
        trainer.train(resume_from_checkpoint=resume)
        return {name: hidden(model.eval(), batch, name) for name in ("sst", "mnli")}

    whole = run("whole")
    for number in (2, 4):
        check_stored_once(tmp_path / "whole" / f"checkpoint-{number}" / name for name in ("sst", "mnli"))
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.allclose(value, whole[name], atol=1e-6) for name, value in resumed.items())
