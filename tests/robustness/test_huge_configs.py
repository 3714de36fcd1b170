"""A base model's config that asks for far more than its file holds is rejected before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2Model

from pal_adapters.multitask import HeadConfig, StorageError, TaskHeads

SIZE = dict(vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=16)


@pytest.mark.parametrize(
    "base",
    [
        lambda: BertModel(BertConfig(**SIZE, num_hidden_layers=2)),
        # Whose config has max_window_layers=28, which is no number of layers.
        lambda: Qwen2Model(Qwen2Config(**SIZE, num_hidden_layers=1, num_key_value_heads=1)),
    ],
)
def test_more_layers_than_tensors(base: object, tmp_path: Path) -> None:
    assert callable(base)
    model = TaskHeads(base())
    model.add("rte", HeadConfig("single_label", 2, pooling="mean"))
    model.prepare_training(base=True)
    ids = torch.arange(3, 17).view(2, 7)
    model.train()(task_ids="rte", input_ids=ids)  # so that the folder holds the base
    model.save_pretrained(tmp_path)
    logits = model.eval()(task_ids="rte", input_ids=ids).logits["rte"]
    again = TaskHeads.from_pretrained(tmp_path)
    assert torch.equal(again(task_ids="rte", input_ids=ids).logits["rte"], logits)
    file = tmp_path / "base.model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 10**5, "layer_types": None}))
    with pytest.raises(StorageError, match=f"num_hidden_layers={10**5}, but its file has only"):
        TaskHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("shard_size", ["5GB", "2KB"])
def test_more_layers_than_tensors_of_a_base_elsewhere(shard_size: str, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "folder"
    BertModel(BertConfig(**SIZE, num_hidden_layers=2)).save_pretrained(base, max_shard_size=shard_size)
    model = TaskHeads(BertModel.from_pretrained(base))
    model.add("rte", HeadConfig("single_label", 2))
    model.prepare_training()
    model.save_pretrained(folder)
    ids = torch.arange(3, 17).view(2, 7)
    logits = model.eval()(task_ids="rte", input_ids=ids).logits["rte"]
    assert torch.equal(TaskHeads.from_pretrained(folder)(task_ids="rte", input_ids=ids).logits["rte"], logits)
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 10**5}))
    with pytest.raises(StorageError, match=f"num_hidden_layers={10**5}, but its file has only"):
        TaskHeads.from_pretrained(folder)
