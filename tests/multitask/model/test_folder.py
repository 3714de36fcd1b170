"""The folder of a `TaskHeads`: its contents, and which of them are trusted."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import HOSTS, backbone
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

import pal_adapters
from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.multitask import HeadConfig, StorageError, TaskHeads
from pal_adapters.multitask.model import files

IDS = torch.arange(4, 24).view(4, 5)


def heads(folder: str, host: str, **given: Any) -> TaskHeads:
    model = TaskHeads(backbone(folder, host, ("rte",)))
    model.add("rte", HeadConfig("single_label", 2))
    model.prepare_training(**given)
    return model.eval()


def logits(model: TaskHeads, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(task_ids="rte", input_ids=ids).logits["rte"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_large_base_model_is_written_in_shards(
    tiny_encoder: str, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARD_SIZE", 10_000)
    model = heads(tiny_encoder, host, base=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    expected = logits(model)
    model.save_pretrained(tmp_path, checkpoint=True)
    shards = sorted((tmp_path / "base.model").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "base.model" / "model.safetensors").exists()
    assert torch.equal(logits(TaskHeads.from_pretrained(tmp_path)), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.restore(tmp_path)
    assert torch.equal(logits(model), expected)
    shards[1].unlink()
    with pytest.raises(StorageError, match=f"{shards[1].name} is not there"):
        TaskHeads.from_pretrained(tmp_path)
    index = tmp_path / "base.model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(StorageError, match=r"index\.json is damaged"):
        TaskHeads.from_pretrained(tmp_path)
    monkeypatch.undo()
    model.save_pretrained(tmp_path, checkpoint=True)  # one file takes the place of the shards
    assert sorted(path.name for path in (tmp_path / "base.model").iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(logits(TaskHeads.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("host", HOSTS)
def test_tokens_that_were_added_to_a_frozen_base_model(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    def resized(seed: int) -> Any:
        base = AutoModel.from_pretrained(tiny_encoder)
        torch.manual_seed(seed)
        base.resize_token_embeddings(base.config.vocab_size + 4, mean_resizing=False)
        return base

    base = resized(1)
    new = base.config.vocab_size - 1
    if host == "adapters":
        import adapters

        adapters.init(base)
        base.add_adapter("rte", config=pal_adapters.PALConfig(hidden_size=12))
    elif host == "peft":
        import peft

        base = peft.get_peft_model(base, pal_adapters.PALPeftConfig(hidden_size=12), adapter_name="rte")
    model = TaskHeads(base)
    model.add("rte", HeadConfig("single_label", 2))
    model.prepare_training()
    model.eval()
    ids = torch.tensor([[5, new, 7], [new - 2, 6, 8]])
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "embeddings.safetensors")
    assert [len(value) for value in stored.values()] == [new + 1]
    for other in (None, resized(2), AutoModel.from_pretrained(tiny_encoder)):
        assert torch.equal(logits(TaskHeads.from_pretrained(tmp_path, other), ids), expected)
    heads(tiny_encoder, host).save_pretrained(tmp_path)  # nothing was added here
    assert not (tmp_path / "embeddings.safetensors").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("left_behind", "Model"), ("os", "system"), ("transformers", "pipeline"), ("transformers", "PreTrainedModel"),
     ("transformers", "__doc__"), ("adapters.models.bert.adapter_model", "AutoAdapterModel"), ("adapters.os", "x")],
)  # fmt: skip
def test_no_class_but_a_model_of_the_hosts(
    tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    if module.startswith("adapters.models") and "adapters" not in HOSTS:
        pytest.skip("needs adapters")
    heads(tiny_encoder, "none").save_pretrained(tmp_path / "saved")
    (tmp_path / "left_behind.py").write_text("class Model:\n    from_pretrained = str\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "saved" / "task_heads.json"
    description = json.loads(path.read_text())
    description["base"] = {"module": module, "class": name, "name_or_path": "x"}
    path.write_text(json.dumps(description))
    with pytest.raises(StorageError, match=r"task_heads\.json"):
        TaskHeads.from_pretrained(tmp_path / "saved")
    assert "left_behind" not in sys.modules


@pytest.mark.parametrize("host", HOSTS[1:])
@pytest.mark.parametrize("name", ["../outside", "rte/../../outside", "..", "x" * 300, "rte\0", ""])
def test_names_that_are_no_folders(tiny_encoder: str, tmp_path: Path, host: str, name: str) -> None:
    heads(tiny_encoder, host).save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved" / "rte", tmp_path / "outside")
    path = tmp_path / "saved" / "task_heads.json"
    description = json.loads(path.read_text())
    description["adapters"] = [name]
    description["tasks"]["rte"]["adapter"] = name
    path.write_text(json.dumps(description))
    with pytest.raises(StorageError, match=r"task_heads\.json is damaged"):
        TaskHeads.from_pretrained(tmp_path / "saved", AutoModel.from_pretrained(tiny_encoder))


@pytest.mark.parametrize("host", HOSTS)
def test_links(tiny_encoder: str, tmp_path: Path, host: str) -> None:
    """The cache of the Hub links a snapshot to its blobs; a link that leads anywhere else is not followed."""
    model = heads(tiny_encoder, host)
    snapshot, blobs = tmp_path / "models--me--x" / "snapshots" / "0123", tmp_path / "models--me--x" / "blobs"
    model.save_pretrained(snapshot)
    blobs.mkdir()
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    for number, path in enumerate(paths):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert torch.equal(logits(TaskHeads.from_pretrained(snapshot)), logits(model))
    for path in paths:
        if path.name == "README.md":
            continue
        outside = tmp_path / "outside"
        shutil.copy(path, outside)
        target = os.readlink(path)
        path.unlink()
        path.symlink_to(outside)
        with pytest.raises(StorageError, match=rf"{path.name} leads out of its folder, to .*outside"):
            TaskHeads.from_pretrained(snapshot)
        path.unlink()
        path.symlink_to(target)


def test_a_backbone_that_is_no_model() -> None:
    with pytest.raises(ConfigError, match=r"TaskHeads\(AutoModel\.from_pretrained\('bert-base-uncased'\)\)"):
        TaskHeads("bert-base-uncased")
    with pytest.raises(ConfigError, match="backbone=None is not a model"):
        TaskHeads(None)


@pytest.mark.parametrize("host", HOSTS[1:])
def test_the_base_model_alone_is_no_adapter(tiny_encoder: str, host: str) -> None:
    model = heads(tiny_encoder, host)
    for name in ("base", "__base__"):
        with pytest.raises(UnknownAdapterError, match=r"For the base model alone pass adapter=None\."):
            model.add("new", HeadConfig("regression"), adapter=name)


@pytest.mark.skipif("peft" not in HOSTS, reason="needs PEFT")
def test_an_adapter_that_transformers_added(tiny_encoder: str) -> None:
    base: Any = AutoModel.from_pretrained(tiny_encoder)
    model = TaskHeads(base)
    base.peft_config = {}  # what its add_adapter sets
    message = r"transformers' own add_adapter.*pass get_peft_model"
    with pytest.raises(UnsupportedError, match=message):
        TaskHeads(base)
    for call in (
        lambda: model.add("rte", HeadConfig("regression")),
        model.prepare_training,
        lambda: model(task_ids=[], input_ids=IDS[:0]),
    ):
        with pytest.raises(UnsupportedError, match=message):
            call()


def test_saving_rejects_what_it_does_not_know(tiny_encoder: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="safe_serialization"):
        heads(tiny_encoder, "none").save_pretrained(tmp_path, safe_serialization=False)  # type: ignore[call-arg]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_base_config_that_asks_for_code(tiny_encoder: str, key: str, trained: bool, tmp_path: Path) -> None:
    """transformers downloads and runs a kernel that a config names."""
    base = tmp_path / "base"
    shutil.copytree(tiny_encoder, base)
    heads(str(base), "none", base=trained).save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "base.model" / "config.json" if trained else base / "config.json"
    TaskHeads.from_pretrained(tmp_path / "saved")
    config.write_text(json.dumps({**json.loads(config.read_text()), key: "stranger/kernel"}))
    try:
        model = TaskHeads.from_pretrained(tmp_path / "saved")
    except StorageError as error:
        assert "asks for the code of 'stranger/kernel'): pass backbone=" in str(error)  # noqa: PT017
    else:  # releases of transformers differ in which of the keys they read
        assert key != "_attn_implementation"
        assert model.config._attn_implementation in ("sdpa", "eager")


def test_a_base_model_that_is_a_pickle(tiny_encoder: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_encoder, base)
    heads(str(base), "none").save_pretrained(tmp_path / "saved")
    (file,) = base.glob("*.safetensors")
    torch.save(load_file(file), base / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(StorageError, match=r"cannot be loaded .*pass backbone="):
        TaskHeads.from_pretrained(tmp_path / "saved")
    TaskHeads.from_pretrained(tmp_path / "saved", AutoModel.from_pretrained(base))


@pytest.mark.parametrize("file", ["task_heads.json", "tasks.json"])
def test_a_key_that_is_given_twice(tiny_encoder: str, tmp_path: Path, file: str) -> None:
    heads(tiny_encoder, HOSTS[0]).save_pretrained(tmp_path)
    text = (tmp_path / "task_heads.json").read_text()
    key = next(iter(json.loads(text)))
    (tmp_path / file).write_text(f'{{"{key}": 1, {text.strip()[1:]}')
    with pytest.raises(StorageError, match=f"{file} is damaged .the key '{key}' is given twice"):
        files.read_json(tmp_path / file)
