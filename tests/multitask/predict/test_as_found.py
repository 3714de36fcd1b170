"""Predictions do not change a model: modes, gradients, active adapters, trainable parameters; also from threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import REQUESTS, made, saved
from backbones import HOSTS
from tiny_tasks import make_tasks
from transformers import AutoModel, AutoTokenizer

from pal_adapters.multitask import Predictor, TaskHeads


@pytest.mark.parametrize("host", HOSTS)
def test_a_model_that_trains(tiny_encoder: str, host: str) -> None:
    model, tasks = made(tiny_encoder, host)
    predictor = Predictor(model, AutoTokenizer.from_pretrained(tiny_encoder), tasks)
    expected = predictor(REQUESTS, arrays=True)
    model.prepare_training(["rte", "ner"])
    model.train()
    model.heads["ner"].eval()
    modes = [module.training for module in model.modules()]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    active = getattr(model.backbone, "active_adapters", None)
    random = torch.get_rng_state()
    for one, wanted in zip(predictor(REQUESTS, arrays=True), expected, strict=True):
        torch.testing.assert_close(torch.tensor(one.array), torch.tensor(wanted.array))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert getattr(model.backbone, "active_adapters", None) == active
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.base_trained


def test_after_an_error(tiny_encoder: str, monkeypatch: Any) -> None:
    model, tasks = made(tiny_encoder, "none")
    predictor = Predictor(model, AutoTokenizer.from_pretrained(tiny_encoder), tasks)
    model.train()
    monkeypatch.setattr(TaskHeads, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predictor(REQUESTS)
    monkeypatch.undo()
    assert all(module.training for module in model.modules())
    assert predictor(REQUESTS[0]).task == "rte"


@pytest.mark.parametrize("host", HOSTS)
def test_threads(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    predictor = saved(tiny_encoder, host, tmp_path)
    expected = [predictor(request, arrays=True).array for request in REQUESTS]
    faults: list[BaseException] = []

    def ask(start: int) -> None:
        try:
            for turn in range(4):
                order = [(start + turn + n) % len(REQUESTS) for n in range(1 + (start + turn) % len(REQUESTS))]
                for number, one in zip(order, predictor([REQUESTS[n] for n in order], arrays=True), strict=True):
                    wanted: Any = expected[number]
                    torch.testing.assert_close(torch.tensor(one.array), torch.tensor(wanted), atol=1e-5, rtol=0)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.skipif("peft" not in HOSTS, reason="needs peft")
def test_lora_of_peft_with_another_method(tiny_encoder: str) -> None:
    import peft

    tasks = make_tasks("rte", "stsb", "topics")
    model = peft.get_peft_model(
        AutoModel.from_pretrained(tiny_encoder), peft.LoraConfig(init_lora_weights=False), adapter_name="rte"
    )
    model.add_adapter("stsb", peft.LoraConfig(init_lora_weights=False, use_dora=True))
    model.add_adapter("topics", peft.LoraConfig(init_lora_weights=False, r=4))
    heads = TaskHeads(model)
    for task in tasks:
        heads.add(task.name, task.head_config())
    model.set_adapter("topics")
    trains = [parameter.requires_grad for parameter in model.parameters()]
    predictor = Predictor(heads, AutoTokenizer.from_pretrained(tiny_encoder), tasks)
    assert len({served.group for served in predictor._served.tasks.values()}) == 2
    asked = [request for request in REQUESTS if request["task"] in ("rte", "stsb", "topics")]
    for request, one in zip(asked, predictor(asked, arrays=True), strict=True):
        alone: Any = predictor(request, arrays=True)
        torch.testing.assert_close(torch.tensor(one.array), torch.tensor(alone.array), atol=1e-5, rtol=0)
    assert list(model.active_adapters) == ["topics"]
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
