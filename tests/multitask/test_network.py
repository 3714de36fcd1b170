"""One network for several tasks: mixed batches, training, MT-uncertainty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import (
    BatchMaker,
    NetworkModel,
    TaskData,
    TrainingConfig,
    UncertaintySampler,
    default_host,
    encode_rows,
    fit_network,
    load_toy_task,
    train_dev_split,
)

NAMES = ("entailment", "similarity", "acceptability")


def setup(folder: str, **options: Any) -> tuple[NetworkModel, list[TaskData], BatchMaker]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = []
    for name in NAMES:
        spec, splits = load_toy_task(name, train_size=30, test_size=10)
        train, dev = train_dev_split(splits["train"])
        encoded = [encode_rows(spec, rows, tokenizer, 48) for rows in (train, dev)]
        tasks.append(TaskData(spec, encoded[0], encoded[1], {}))
    specs = [task.spec for task in tasks]
    model = NetworkModel(AutoModel.from_pretrained(folder), specs, host=default_host(), max_length=48, **options)
    return model, tasks, BatchMaker(tokenizer, model.device)


def test_a_mixed_batch_equals_one_batch_a_task(tiny_encoder: str) -> None:
    model, tasks, batches = setup(tiny_encoder)
    model.eval()
    for parameter in model.trained_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    chosen = [(task, row) for row in range(3) for task in tasks]
    mixed = model.mixed(
        [task.spec.name for task, _ in chosen], batches.pad([task.train.inputs[row][0] for task, row in chosen])
    )
    for task in tasks:
        alone = model(task.spec.name, batches(task.spec, task.train, range(3))[0])
        assert torch.allclose(mixed[task.spec.name], alone, atol=1e-5)


@pytest.mark.parametrize("network", ["ca_mtl_base", "ca_mtl_large"])
@pytest.mark.parametrize("sampling", ["proportional", "mt_uncertainty"])
def test_training(tiny_encoder: str, network: str, sampling: Any, tmp_path: Any) -> None:
    model, tasks, batches = setup(tiny_encoder, network=network)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = set(model.trained_parameters())
    sampler = UncertaintySampler() if sampling == "mt_uncertainty" else None
    config = TrainingConfig(epochs=2, batch_size=8, learning_rate=1e-2, max_steps=6, progress=False)
    result = fit_network(model, tasks, config, batches, sampling=sampling, sampler=sampler)
    assert result.steps == 6
    assert sum(result.draws.values()) == 48
    if sampler is not None:
        assert (sampler.forward_rows, sampler.cost) == (6 * 24, 3.0)
    after = dict(model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved <= trained
    assert any(".heads" in f".{name}" for name in moved)
    assert any("task_embedding" in name for name in moved)
    assert not model.training
    model.save(tmp_path)
    assert set(load_file(tmp_path / "heads.safetensors")) == {f"{n}.{p}" for n in NAMES for p in ("weight", "bias")}
    assert list((tmp_path / "tasks").glob("*.safetensors"))


def test_wrong_arguments(tiny_encoder: str) -> None:
    with pytest.raises(ConfigError, match="network='pal'"):
        setup(tiny_encoder, network="pal")
    model, tasks, batches = setup(tiny_encoder)
    with pytest.raises(ConfigError, match=r"sampler=.* has no effect"):
        fit_network(model, tasks, TrainingConfig(), batches, sampler=UncertaintySampler())
    with pytest.raises(ConfigError, match="sampling='round_robin'"):
        fit_network(model, tasks, TrainingConfig(), batches, sampling="round_robin")  # type: ignore[arg-type]
