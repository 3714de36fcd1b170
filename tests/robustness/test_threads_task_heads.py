"""Threads that share a `TaskHeads`, each with a task of its own: every call gives what it gives alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

import pal_adapters
from pal_adapters.multitask import HeadConfig, TaskHeads

THREADS = 8
CALLS = int(os.environ.get("PAL_ADAPTERS_THREAD_CALLS", "25"))
TASKS = ("de", "fr", "it", "none")

IN_ADAPTERS: dict[str, Callable[[str], Any]] = {
    "pal": lambda name: pal_adapters.PALConfig(hidden_size=12, num_heads=2),
    "low_rank": lambda name: pal_adapters.LowRankConfig(hidden_size=6),
    "seq_bn": lambda name: "seq_bn[reduction_factor=4]",
    "lora": lambda name: "lora[r=4]",
    "prefix_tuning": lambda name: "prefix_tuning[prefix_length=3]",
}
IN_PEFT: dict[str, Callable[[Any], Any]] = {
    "pal": lambda peft: pal_adapters.PALPeftConfig(hidden_size=12, num_heads=2),
    "houlsby": lambda peft: pal_adapters.HoulsbyPeftConfig(hidden_size=6),
    "lhuc": lambda peft: pal_adapters.LHUCPeftConfig(),
    "lora": lambda peft: peft.LoraConfig(target_modules=["query", "value"], r=4),
    "ia3": lambda peft: peft.IA3Config(target_modules=["query", "value"], feedforward_modules=[]),
}
CASES = [("adapters", name) for name in IN_ADAPTERS] if "PALConfig" in pal_adapters.__all__ else []
CASES += [("peft", name) for name in (*IN_PEFT, "ca_mtl")] if "PALPeftConfig" in pal_adapters.__all__ else []
CASES += [("adapters", "ca_mtl")] if "PALConfig" in pal_adapters.__all__ else []


def model_of(host: str, method: str) -> TaskHeads:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base: Any = BertModel(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=32))
    names = TASKS[:3]
    if host == "adapters":
        import adapters

        adapters.init(base)
        if method == "ca_mtl":
            base.add_adapter("net", config=pal_adapters.CAMTLConfig(tasks=list(names)))
        else:
            for name in names:
                base.add_adapter(name, config=IN_ADAPTERS[method](name))
    else:
        import peft

        if method == "ca_mtl":
            base = peft.get_peft_model(base, pal_adapters.CAMTLPeftConfig(tasks=list(names)), adapter_name="net")
        else:
            base = peft.get_peft_model(base, IN_PEFT[method](peft), adapter_name=names[0])
            for name in names[1:]:
                base.add_adapter(name, IN_PEFT[method](peft))
    heads = TaskHeads(base)
    for name in names:
        heads.add(name, HeadConfig("single_label", 3))
    heads.add("none", HeadConfig("single_label", 3), adapter=None)
    heads.prepare_training()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in heads.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return heads.eval().requires_grad_(False)


@pytest.mark.parametrize(("host", "method"), CASES)
def test_tasks_that_differ_by_thread(host: str, method: str) -> None:
    model = model_of(host, method)

    def call(number: int) -> Tensor:
        length = 5 + number % 3
        ids = torch.randint(3, 40, (3, length), generator=torch.Generator().manual_seed(number))
        task = TASKS[number % len(TASKS)]
        return model(task_ids=task, input_ids=ids).logits[task]

    expected = [call(number) for number in range(THREADS)]
    assert not torch.allclose(expected[0], expected[4], atol=1e-3)
    found: list[list[Any]] = [[] for _ in range(THREADS)]
    start = threading.Barrier(THREADS)

    def work(number: int) -> None:
        start.wait()
        for turn in range(CALLS):
            try:
                found[number].append(call((number + turn) % THREADS))
            except Exception as error:  # shown with the values below
                found[number].append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = []
    for number, results in enumerate(found):
        assert len(results) == CALLS
        for turn, result in enumerate(results):
            want = expected[(number + turn) % THREADS]
            if isinstance(result, Exception) or (result - want).abs().max() > 1e-5:
                wrong.append(result if isinstance(result, Exception) else "other values")
    assert not wrong, f"{len(wrong)} of {THREADS * CALLS}: {wrong[0]!r}"


# Calls inside a call share the forward context of adapters, in which these have one input for both.
SHARING = {("adapters", "prefix_tuning"), ("adapters", "ca_mtl")}


@pytest.mark.parametrize(("host", "method"), [case for case in CASES if case not in SHARING])
def test_a_call_for_another_task_inside_a_call(host: str, method: str) -> None:
    """From a hook on the embeddings: right, or refused where the host keeps the active adapter in the model."""
    model = model_of(host, method)
    ids = torch.randint(3, 40, (3, 5), generator=torch.Generator().manual_seed(0))

    def call(task: str) -> Tensor:
        return model(task_ids=task, input_ids=ids).logits[task]

    expected = {task: call(task) for task in TASKS}
    base = model.backbone if host == "adapters" else model.backbone.get_base_model()
    seen: list[Tensor] = []

    def hook(*_: Any) -> None:
        handle.remove()
        seen.append(call("fr"))

    handle = base.embeddings.register_forward_hook(hook)
    if (host, method) in (("peft", "lora"), ("peft", "ia3")):
        with pytest.raises(pal_adapters.UnsupportedError, match="called from within itself for a task with another"):
            call("de")
    else:
        assert torch.allclose(call("de"), expected["de"], atol=1e-5)
        assert torch.allclose(seen[0], expected["fr"], atol=1e-5)
    for task, logits in expected.items():
        assert torch.allclose(call(task), logits, atol=1e-5)
