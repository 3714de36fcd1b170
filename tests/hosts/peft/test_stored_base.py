"""Adapters with `train_base` that are saved together store the pretrained weights once; each folder loads alone."""

from __future__ import annotations

import os
import pathlib
import shutil
import warnings
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file

from pal_adapters import StorageError
from pal_adapters.hosts import base_files
from tests.hosts.base_folders import DAMAGE, bases, check_stored_once, in_one_file, key_of

from . import cases
from .test_joint import train
from .unchanged import rejected

FILE = "adapter_model.safetensors"
NAMES = ("default", "sst", "mnli")


def trained(method: str = "pal", **changes: Any) -> PeftModel:
    model = cases.peft_model(method, adapters=NAMES, train_base=True, **changes)
    for name in NAMES:
        model.set_adapter(name)
        train(model, cases.inputs())
    return model


def outputs(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: cases.run(model, name, cases.inputs()) for name in NAMES}


def folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    return {name: root if name == "default" else root / name for name in NAMES}


def loaded(root: pathlib.Path) -> PeftModel:
    model = PeftModel.from_pretrained(cases.bert(), root)
    for name in NAMES[1:]:
        model.load_adapter(root / name, name)
    return model


def test_stored_once_and_loaded(method: str, tmp_path: pathlib.Path) -> None:
    model = trained(method)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    check_stored_once(folders(tmp_path).values())
    for name, folder in folders(tmp_path).items():
        own = load_file(folder / FILE)
        stored = own.pop(key_of(own))
        assert f"base-{bytes(stored[0].tolist()).hex()}.safetensors" == bases(folder)[0].name
        whole = get_peft_model_state_dict(model, adapter_name=name)  # which stays whole
        both = {**load_file(bases(folder)[0]), **own}
        assert both.keys() == whole.keys()
        assert all(torch.equal(both[key], value) for key, value in whole.items())
    again = loaded(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in outputs(again).items())


@pytest.mark.parametrize("low", [False, True])
def test_a_folder_moved_away_loads_alone(low: bool, tmp_path: pathlib.Path) -> None:
    model = trained()
    expected = outputs(model)["sst"]
    model.save_pretrained(tmp_path / "all")
    shutil.copytree(tmp_path / "all" / "sst", tmp_path / "alone")
    shutil.rmtree(tmp_path / "all")
    other = PeftModel.from_pretrained(cases.bert(), tmp_path / "alone", low_cpu_mem_usage=low)
    assert torch.equal(cases.run(other, "default", cases.inputs()), expected)
    inside = PeftModel.from_pretrained(cases.bert(), tmp_path, subfolder="alone", low_cpu_mem_usage=low)
    assert torch.equal(cases.run(inside, "default", cases.inputs()), expected)
    plain = cases.bert()
    plain.load_adapter(str(tmp_path / "alone"), "sst")  # transformers' own
    with torch.no_grad():
        assert torch.equal(plain(**cases.inputs()).logits, expected)
    in_one_file(tmp_path / "alone", FILE)  # as if it had been saved alone
    other = PeftModel.from_pretrained(cases.bert(), tmp_path / "alone", low_cpu_mem_usage=low)
    assert torch.equal(cases.run(other, "default", cases.inputs()), expected)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_base_changes_nothing(damage: str, tmp_path: pathlib.Path) -> None:
    change, message = DAMAGE[damage]
    trained().save_pretrained(tmp_path)
    folder = tmp_path / "sst"
    change(folder, FILE)
    plain, other = cases.bert(), cases.peft_model("pal", adapters=("rte",))
    inside = cases.bert()
    for model, load in (
        (plain, lambda: PeftModel.from_pretrained(plain, folder)),
        (other, lambda: other.load_adapter(folder, "sst", is_trainable=True)),
        (inside, lambda: inside.load_adapter(str(folder), "sst")),
    ):
        with rejected(model, error=StorageError, match=message):
            load()


def test_tensors_without_their_folder(tmp_path: pathlib.Path) -> None:
    trained().save_pretrained(tmp_path)
    model = cases.peft_model("pal", adapters=("sst",), train_base=True)
    with rejected(model, error=StorageError, match=r"base-.* beside its file.*: load its folder"):
        set_peft_model_state_dict(model, load_peft_weights(str(tmp_path / "sst"), device="cpu"), "sst")


def test_a_base_of_an_adapter_that_does_not_train_it(tmp_path: pathlib.Path) -> None:
    trained().save_pretrained(tmp_path)
    config = tmp_path / "sst" / "adapter_config.json"
    config.write_text(config.read_text().replace('"train_base": true', '"train_base": false'))
    plain, inside = cases.bert(), cases.bert()
    for model, load in (
        (plain, lambda: PeftModel.from_pretrained(plain, tmp_path / "sst")),
        (inside, lambda: inside.load_adapter(str(tmp_path / "sst"), "sst")),
    ):
        with rejected(model, error=StorageError, match=r"does not train|does not have on this model"):
            load()


def test_saving_again_leaves_no_base_behind(tmp_path: pathlib.Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    first = bases(tmp_path)
    model.save_pretrained(tmp_path)
    assert bases(tmp_path) == first  # of the same content
    train(model, cases.inputs())
    (tmp_path / "sst" / ".base-1.writing").write_bytes(b"of a process that was killed")
    model.save_pretrained(tmp_path)
    check_stored_once(folders(tmp_path).values())
    assert bases(tmp_path) != first
    expected = outputs(model)
    assert all(torch.equal(value, expected[name]) for name, value in outputs(loaded(tmp_path)).items())
    model.save_pretrained(tmp_path, selected_adapters=["sst"])
    assert not bases(tmp_path / "sst")
    assert bases(tmp_path / "mnli")
    assert all(torch.equal(value, expected[name]) for name, value in outputs(loaded(tmp_path)).items())


def test_an_interrupted_save_leaves_every_folder_complete(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds the adapter of before or of now, with the base of that time."""
    model = trained()
    model.save_pretrained(tmp_path)
    old = outputs(model)
    train(model, cases.inputs())
    new = outputs(model)
    writer = __import__("peft.peft_model", fromlist=["safe_save_file"]).safe_save_file

    def stop(tensors: Any, path: str, **more: Any) -> None:
        if "sst" in path:
            raise KeyboardInterrupt
        writer(tensors, path, **more)

    monkeypatch.setattr("peft.peft_model.safe_save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    for name, folder in folders(tmp_path).items():
        other = PeftModel.from_pretrained(cases.bert(), folder)
        assert torch.equal(cases.run(other, "default", cases.inputs()), (new if name == "default" else old)[name])
    model.save_pretrained(tmp_path)
    check_stored_once(folders(tmp_path).values())


def test_a_file_system_without_links(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    model = trained()
    model.save_pretrained(tmp_path)
    check_stored_once(folders(tmp_path).values(), linked=False)
    expected = outputs(model)
    assert all(torch.equal(value, expected[name]) for name, value in outputs(loaded(tmp_path)).items())


def test_a_large_base_is_stored_in_parts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_files, "SHARD_SIZE", 30_000)
    model = trained()
    model.save_pretrained(tmp_path)
    check_stored_once(folders(tmp_path).values(), files=3)
    assert all(path.stat().st_size < 35_000 for path in bases(tmp_path))
    expected = outputs(model)
    assert all(torch.equal(value, expected[name]) for name, value in outputs(loaded(tmp_path)).items())
    bases(tmp_path)[1].unlink()
    plain = cases.bert()
    with rejected(plain, error=StorageError, match="is missing"):
        PeftModel.from_pretrained(plain, tmp_path)


def test_adapters_that_wrap_different_modules(tmp_path: pathlib.Path) -> None:
    """Wrapped modules have other names, so these adapters have base files of their own."""
    first = cases.config("houlsby", task_type="SEQ_CLS", train_base=True, target_modules=["output.dense"])
    model = get_peft_model(cases.bert(), first, adapter_name="sst")
    for name, target in (("mnli", "attention.output.dense"), ("default", "output.dense")):
        config = cases.config("houlsby", task_type="SEQ_CLS", train_base=True, target_modules=[target])
        model.add_adapter(name, config)
        model.set_adapter(name)
        train(model, cases.inputs())
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    for name, folder in folders(tmp_path).items():
        other = PeftModel.from_pretrained(cases.bert(), folder)
        assert torch.equal(cases.run(other, "default", cases.inputs()), expected[name])
        plain = cases.bert()
        plain.load_adapter(str(folder), name)
        with torch.no_grad():
            assert torch.equal(plain(**cases.inputs()).logits, expected[name])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_repository(damaged: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is the local cache here."""
    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    model = trained()
    expected = outputs(model)
    model.save_pretrained(tmp_path / "all")
    repository = hub / "models--user--sst"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(tmp_path / "all" / "sst", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    if damaged:
        DAMAGE["one bit"][0](snapshot, FILE)
    wrapped, plain = cases.bert(), cases.bert()
    more = {"cache_dir": str(hub)}
    for target, load in (
        (wrapped, lambda: PeftModel.from_pretrained(wrapped, "user/sst", adapter_name="sst", **more)),
        (plain, lambda: plain.load_adapter("user/sst", "sst", adapter_kwargs=more) or plain),
    ):
        if damaged:
            with rejected(target, error=StorageError, match="is damaged"):
                load()
            continue
        load()
        with torch.no_grad():  # the layers are inside the model
            assert torch.equal(target.eval()(**cases.inputs()).logits, expected["sst"])


def test_checkpoints_of_a_trainer(tmp_path: pathlib.Path) -> None:
    """Each has the base once, and resuming from one ends where an uninterrupted run does."""

    def run(folder: str, resume: str | None = None) -> dict[str, torch.Tensor]:
        model = cases.peft_model("pal", adapters=("rte", "sst"), train_base=True)
        given = cases.inputs()
        rows = [{**{k: v[i] for k, v in given.items()}, "labels": torch.tensor(i % 3)} for i in range(4)]
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=4, per_device_train_batch_size=2, learning_rate=0.01, use_cpu=True,
            save_strategy="steps", save_steps=2, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return {name: cases.run(model.eval(), name, given) for name in ("rte", "sst")}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = run("whole")
        for step in (2, 4):
            check_stored_once(tmp_path / "whole" / f"checkpoint-{step}" / name for name in ("rte", "sst"))
        resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.allclose(value, whole[name], atol=1e-6) for name, value in resumed.items())
