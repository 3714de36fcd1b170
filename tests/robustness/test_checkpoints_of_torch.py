"""Blocks that run again under torch's own activation checkpointing, which does not know the call they belong to.

FSDP and accelerate put `CheckpointWrapper` around blocks; users and models from the Hub call `torch.utils.checkpoint`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

import pal_adapters
from pal_adapters.errors import UnsupportedError
from pal_adapters.multitask import HeadConfig, TaskHeads

from .threads import ids_of, loss_of, randomise

TASKS = ("rte", "sst", "qqp")
HOSTS = [host for host, name in (("adapters", "PALConfig"), ("peft", "PALPeftConfig")) if name in pal_adapters.__all__]
METHODS = {"peft": ("pal", "houlsby", "ca_mtl", "lora"), "adapters": ("pal", "lora")}
CASES = [(host, method) for host in HOSTS for method in METHODS[host]]
Call = Callable[[Any, int], Tensor]


def backbone(host: str, method: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base: Any = BertModel(
        BertConfig(**sizes, intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    pal = {"hidden_size": 12, "num_heads": 2, "dropout": 0.0}
    if host == "adapters":
        import adapters

        adapters.init(base)
        for name in TASKS:
            config = pal_adapters.PALConfig(**pal) if method == "pal" else adapters.LoRAConfig(r=4, dropout=0.0)
            base.add_adapter(name, config=config)
        return base
    import peft

    if method == "ca_mtl":
        return peft.get_peft_model(base, pal_adapters.CAMTLPeftConfig(tasks=list(TASKS)), adapter_name="net")
    make: Any = {
        "pal": lambda: pal_adapters.PALPeftConfig(**pal),
        "houlsby": lambda: pal_adapters.HoulsbyPeftConfig(hidden_size=6),
        "lora": lambda: peft.LoraConfig(target_modules=["query", "value"], r=4),
    }[method]
    model = peft.get_peft_model(base, make(), adapter_name=TASKS[0])
    for name in TASKS[1:]:
        model.add_adapter(name, make())
    return model


def task_heads(host: str, method: str) -> TaskHeads:
    model = TaskHeads(backbone(host, method))
    for name in TASKS:
        model.add(name, HeadConfig("single_label", 3))
    model.prepare_training()
    randomise(model)
    model.backbone.enable_input_require_grads()
    return model.train()


def one_task(model: Any, number: int) -> Tensor:
    task = TASKS[number]
    return model(task_ids=task, input_ids=ids_of(number), labels=torch.tensor([0, 1, 2, 1])).loss


def several_tasks(model: Any, number: int) -> Tensor:
    first, second = TASKS[number], TASKS[number - 1]
    labels = {first: torch.tensor([0, 1, 2]), second: torch.tensor([1])}
    return model(task_ids=[first, first, second, first], input_ids=ids_of(number), labels=labels).loss


def gradients(model: nn.Module, call: Call) -> dict[str, Tensor | None]:
    """Of three calls of different tasks before one backward pass."""
    losses = [(1 + number) * call(model, number) for number in range(3)]
    torch.stack(losses).sum().backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def compare(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def wrap(model: nn.Module, *, reentrant: bool) -> None:
    """As FSDP's `activation_checkpointing` in accelerate does."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: isinstance(module, BertLayer)
    )


def checkpoint_blocks(model: nn.Module, *, reentrant: bool) -> None:
    """As a model that calls `torch.utils.checkpoint` itself."""
    for block in [module for module in model.modules() if isinstance(module, BertLayer)]:
        inner = block.forward

        def forward(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            return checkpoint(functools.partial(inner, **kwargs), *args, use_reentrant=reentrant)

        block.forward = forward


@pytest.mark.parametrize("call", [one_task, several_tasks])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("host", "method"), CASES)
def test_wrapped_blocks(host: str, method: str, reentrant: bool, call: Call) -> None:
    if (host, method) == ("peft", "lora") and call is several_tasks:
        call = one_task  # PEFT trains LoRA on one task at a time
    expected = gradients(task_heads(host, method), call)
    model = task_heads(host, method)
    wrap(model, reentrant=reentrant)
    compare(gradients(model, call), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("host", "method"), CASES)
def test_the_backward_pass_of_alternating_tasks_in_another_thread(host: str, method: str, reentrant: bool) -> None:
    """With the host's own activation checkpointing; adapters has one kind of it."""
    expected = gradients(task_heads(host, method), one_task)
    model = task_heads(host, method)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant and host == "peft"})
    loss = torch.stack([(1 + number) * one_task(model, number) for number in range(3)]).sum()
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    compare({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected)


@pytest.mark.parametrize("call", [one_task, several_tasks])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("host", "method"), [case for case in CASES if case[1] != "lora"])
def test_blocks_that_run_again_without_their_call(host: str, method: str, reentrant: bool, call: Call) -> None:
    model = task_heads(host, method)
    checkpoint_blocks(model, reentrant=reentrant)
    with pytest.raises(UnsupportedError, match="task_ids is None" if method == "ca_mtl" else "outside of a call"):
        gradients(model, call)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("host", "method"), CASES)
def test_whole_calls_that_run_again(host: str, method: str, reentrant: bool) -> None:
    expected = gradients(task_heads(host, method), one_task)

    def call(model: Any, number: int) -> Tensor:
        start = torch.zeros((), requires_grad=True)
        return checkpoint(lambda zero: one_task(model, number) + zero, start, use_reentrant=reentrant)

    compare(gradients(task_heads(host, method), call), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_the_active_adapter(host: str, reentrant: bool) -> None:
    """Nothing has to be known about the call if the adapter is the model's own."""

    def model() -> Any:
        made = backbone(host, "pal")
        if host == "adapters":
            made.train_adapter("sst")
        else:
            made.set_adapter("sst")
        randomise(made)
        made.enable_input_require_grads()
        return made.train()

    def call(model: Any, number: int) -> Tensor:
        return loss_of(model(input_ids=ids_of(number)).last_hidden_state)

    expected = gradients(model(), call)
    for change in (wrap, checkpoint_blocks):
        changed = model()
        change(changed, reentrant=reentrant)
        compare(gradients(changed, call), expected)
