"""Calls in one thread while another compiles or exports: `torch.compiler.is_compiling` is then true in all threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pal_adapters
from pal_adapters.errors import UnknownAdapterError

from .test_threads_task_heads import model_of

HOSTS = [host for host, name in (("adapters", "PALConfig"), ("peft", "PALPeftConfig")) if name in pal_adapters.__all__]
IDS = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(0))


def in_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    worker = threading.Thread(target=lambda: found.append(call()))
    worker.start()
    worker.join()
    return found[0]


def during_compilation(call: Callable[[], Any]) -> Any:
    """`call()` in a thread of its own, while this one compiles a function."""
    found: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        assert torch.compiler.is_compiling()
        found.append(in_a_thread(call))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(3))
    return found[0]


def during_export(call: Callable[[], Any]) -> Any:
    """The same while this one exports a module."""
    found: list[Any] = []

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not found:
                found.append(in_a_thread(call))
            return x.sin()

    torch.export.export(Module(), (torch.ones(3),), strict=False)
    return found[0]


@pytest.mark.parametrize("meanwhile", [during_compilation, during_export])
@pytest.mark.parametrize("method", ["pal", "ca_mtl"])
@pytest.mark.parametrize("host", HOSTS)
def test_the_loss_of_several_tasks(host: str, method: str, meanwhile: Callable[..., Any]) -> None:
    model = model_of(host, method)
    labels = {"de": torch.tensor([0, 1]), "fr": torch.tensor([2]), "it": torch.tensor([1])}

    def call() -> Tensor:
        return model(task_ids=["de", "fr", "it", "de"], input_ids=IDS, labels=labels).loss

    with torch.no_grad():
        # transformers builds other masks while `torch.compiler.is_compiling`.
        torch.testing.assert_close(meanwhile(call), call())


@pytest.mark.parametrize("meanwhile", [during_compilation, during_export])
@pytest.mark.parametrize("host", HOSTS)
def test_task_ids_are_checked(host: str, meanwhile: Callable[..., Any]) -> None:
    """The values of `task_ids` are unknown in a graph only."""
    backbone = model_of(host, "ca_mtl").backbone
    if host == "adapters":
        backbone.set_active_adapters("net")

    def call() -> str:
        with pytest.raises(UnknownAdapterError) as caught:
            backbone(input_ids=IDS, task_ids=torch.tensor([0, -1, 1, 2]))
        return str(caught.value)

    assert "task_ids has -1, which is no task of this adapter" in meanwhile(call)


@pytest.mark.parametrize("host", HOSTS)
def test_copies_of_a_network_stay_with_its_call(host: str) -> None:
    """A call of the plain model in the middle of a call of the network, both while a third thread compiles."""
    model = model_of(host, "ca_mtl")
    base = model.backbone if host == "adapters" else model.backbone.get_base_model()
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    seen: list[dict[str, int]] = []
    inside = base.encoder.layer[1].output.dense
    inside.register_forward_hook(lambda *_: seen.append({n: id(p) for n, p in model.named_parameters()}))
    during_compilation(lambda: model(task_ids="de", input_ids=IDS))
    assert seen == [names]
