"""A caller's own activation checkpointing runs a block again outside of its call: the gradient is right, or an error.

`model.gradient_checkpointing_enable()` restores what held in the call; `torch.utils.checkpoint` around a block cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

import pal_adapters as pa
from tests import zoo

pytestmark = [
    *zoo.HOST_WARNINGS,
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]
IDS = torch.arange(3, 31).reshape(4, 7)
TASKS = ["rte", "sst", "qqp"]
reentrant = pytest.mark.parametrize("reentrant", [False, True])


def base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    rest = {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**sizes, **rest))


def in_peft(method: str) -> Any:
    peft = pytest.importorskip("peft")
    if method == "ca_mtl":
        return prepared(peft.get_peft_model(base(), pa.CAMTLPeftConfig(tasks=list(TASKS), max_length=16)))
    model = peft.get_peft_model(base(), pa.PALPeftConfig(hidden_size=12, num_heads=2, dropout=0.0), adapter_name="rte")
    for name in TASKS[1:]:
        model.add_adapter(name, pa.PALPeftConfig(hidden_size=12, num_heads=2, dropout=0.0))
    model.set_requires_grad(TASKS)
    return prepared(model)


def in_adapters() -> Any:
    adapters = pytest.importorskip("adapters")
    model = base()
    adapters.init(model)
    for name in TASKS:
        model.add_adapter(name, config=pa.PALConfig(hidden_size=12, num_heads=2, dropout=0.0))
    model.train_adapter(adapters.composition.Stack(*TASKS))
    model.set_active_adapters("rte")
    return prepared(model)


def prepared(model: Any) -> Any:
    zoo.randomise(nn.ParameterList(p for p in model.parameters() if p.requires_grad), std=0.3, seed=1)
    model.enable_input_require_grads()
    return model.train()


class Checkpointed(nn.Module):
    """A block that a caller checkpoints."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block = block
        self.reentrant = reentrant

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(self.block, **kwargs), *args, use_reentrant=self.reentrant)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("block", "reentrant") else getattr(self.block, name)


def checkpoint_blocks(model: Any, reentrant: bool) -> None:
    layers = (model.get_base_model() if hasattr(model, "get_base_model") else model).encoder.layer
    for index, block in enumerate(list(layers)):
        layers[index] = Checkpointed(block, reentrant)


def gradients(model: Any, *calls: Callable[[], Tensor]) -> list[Tensor | None]:
    """Of all calls in one backward pass; `torch.autograd.grad` does not work with reentrant checkpoints."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    outputs = [call() for call in calls]
    loss: Any = sum(output.square().mean() * (number + 1) for number, output in enumerate(outputs))
    loss.backward()
    return [parameter.grad for parameter in parameters]


def states(model: Any, **arguments: Any) -> Callable[[], Tensor]:
    return lambda: model(input_ids=IDS, **arguments).last_hidden_state


@reentrant
@pytest.mark.parametrize("make", [lambda: in_peft("pal"), in_adapters], ids=["peft", "adapters"])
def test_one_active_adapter(make: Callable[[], Any], reentrant: bool) -> None:
    model = make()
    expected = gradients(model, states(model), states(model))
    checkpoint_blocks(model, reentrant)
    for found, right in zip(gradients(model, states(model), states(model)), expected, strict=True):
        assert (found is None) == (right is None)
        assert found is None or right is None or torch.allclose(found, right, atol=1e-6)


@reentrant
@pytest.mark.parametrize("names", [[*TASKS, "rte"], ["sst"] * 4])
def test_adapter_names(names: list[str], reentrant: bool) -> None:
    model = in_peft("pal")
    checkpoint_blocks(model, reentrant)
    for calls in ([states(model, adapter_names=names)], [states(model, adapter_names=names), states(model)]):
        with pytest.raises(pa.UnsupportedError, match=r"adapter_names of its call: use model\.gradient_checkpointing"):
            gradients(model, *calls)
    model.eval()  # the next call is right
    assert torch.equal(states(model)(), states(model, adapter_names=["rte"] * 4)())


@reentrant
def test_task_ids(reentrant: bool) -> None:
    model = in_peft("ca_mtl")
    checkpoint_blocks(model, reentrant)
    with pytest.raises(pa.UnsupportedError, match="does not restore the task_ids of its call"):
        gradients(model, states(model, task_ids=[0, 1, 2, 0]), states(model, task_ids=[1, 1, 2, 0]))


@reentrant
@pytest.mark.parametrize("setup", ["sst", "multi task"])
def test_setups(setup: str, reentrant: bool) -> None:
    model = in_adapters()
    import adapters

    many = setup == "multi task"
    composition = adapters.composition.MultiTask(*TASKS) if many else adapters.composition.Stack(setup)

    def call() -> Tensor:
        with adapters.AdapterSetup(composition):
            return states(model, **({"task_ids": ["rte", "sst", "qqp", "rte"]} if many else {}))()

    expected = gradients(model, call)
    model.gradient_checkpointing_enable()
    for found, right in zip(gradients(model, call), expected, strict=True):
        assert found is None or right is None or torch.allclose(found, right, atol=1e-6)
    model.gradient_checkpointing_disable()
    checkpoint_blocks(model, reentrant)
    with pytest.raises(pa.UnsupportedError, match="does not restore the AdapterSetup of its call"):
        gradients(model, call)


@reentrant
def test_a_call_without_names_before_one_with_them(reentrant: bool) -> None:
    """Through transformers' own checkpointing, which restores what held in each."""
    model = in_peft("pal")
    calls = [states(model), states(model, adapter_names=[*TASKS, "rte"])]
    expected = gradients(model, *calls)
    model = in_peft("pal")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = [states(model), states(model, adapter_names=[*TASKS, "rte"])]
    for found, right in zip(gradients(model, *calls), expected, strict=True):
        assert (found is None) == (right is None)
        assert found is None or right is None or torch.allclose(found, right, atol=1e-6)
