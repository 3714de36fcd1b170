"""Models whose weights accelerate keeps elsewhere between calls, as `device_map` does."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("accelerate")

import accelerate
import torch
from peft import get_peft_model
from torch import nn

from pal_adapters import UnsupportedError
from pal_adapters.blocks.placement import computing_device, offloaded_to
from tests import zoo
from tests.families.checks import METHODS
from tests.zoo import HOST_WARNINGS

pytestmark = HOST_WARNINGS
CPU = torch.device("cpu")
_COPYING = ("CA-MTL", "Houlsby")  # they copy pretrained weights


def _to_cpu(model: nn.Module, folder: pathlib.Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def _to_disk(model: nn.Module, folder: pathlib.Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def _adapted(base: nn.Module, method: str) -> Any:
    model = get_peft_model(base, METHODS[method]()).eval()
    added = [p for name, p in model.named_parameters() if p.requires_grad]
    assert {p.device for p in added} == {CPU}
    zoo.randomise(nn.ParameterList(added), seed=11)
    return model


@pytest.mark.parametrize("offload", [_to_cpu, _to_disk])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in _COPYING])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_offloaded_before_adding(
    name: str, method: str, offload: Callable[[nn.Module, pathlib.Path], None], tmp_path: pathlib.Path
) -> None:
    host = zoo.BY_NAME[name]
    inputs = host.inputs()
    base = host.build()
    offload(base, tmp_path)
    assert {p.device.type for p in base.parameters()} == {"meta"}
    model, expected = _adapted(base, method), _adapted(host.build(), method)
    with torch.no_grad():
        plain = zoo.outputs_of(host.build()(**inputs))
        outputs, wanted = zoo.outputs_of(model(**inputs)), zoo.outputs_of(expected(**inputs))
    for key, value in wanted.items():
        assert torch.equal(outputs[key], value)
        assert not torch.equal(value, plain[key])


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in _COPYING])
def test_offloaded_after_adding(method: str, routed: bool) -> None:
    """Accelerate brings the weights of a module back when it is called, and task modules read them in another way."""
    host = zoo.BY_NAME["bert"]
    model = _adapted(host.build(), method)
    accelerate.cpu_offload(model, execution_device=CPU)
    inputs = host.inputs()
    names = {"adapter_names": ["default", *["__base__"] * (len(inputs["input_ids"]) - 1)]} if routed else {}
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"are offloaded, .* add the adapters after that"):
        model(**inputs, **names)


@pytest.mark.parametrize("method", _COPYING)
def test_copies_of_weights_that_are_elsewhere(method: str) -> None:
    base = zoo.BY_NAME["bert"].build()
    accelerate.cpu_offload(base, execution_device=CPU)
    with pytest.raises(UnsupportedError, match=r"accelerate offloads weights of \w+, which .* cop"):
        get_peft_model(base, METHODS[method]())


@pytest.mark.parametrize("method", METHODS)
def test_hooks_that_only_move_inputs(method: str) -> None:
    host = zoo.BY_NAME["bert"]
    base, inputs = host.build(), host.inputs()
    for module in base.modules():
        accelerate.hooks.add_hook_to_module(
            module, accelerate.hooks.AlignDevicesHook(io_same_device=True), append=True
        )
    model, expected = _adapted(base, method), _adapted(host.build(), method)
    tasks = {"task_ids": ["a", "b", "a"]} if method == "CA-MTL" else {}
    with torch.no_grad():
        outputs, wanted = (zoo.outputs_of(m(**inputs, **tasks)) for m in (model, expected))
    for key, value in wanted.items():
        assert torch.equal(outputs[key], value)


def test_where_a_module_computes() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    meta = torch.device("meta")
    assert (offloaded_to(module), computing_device(module, CPU)) == (None, CPU)
    assert computing_device(module, meta) == meta  # not loaded yet
    accelerate.cpu_offload(module, execution_device=CPU)
    assert computing_device(module, meta) == CPU
    accelerate.hooks.add_hook_to_module(module[0], accelerate.hooks.ModelHook(), append=True)  # a sequence of hooks
    assert offloaded_to(module[0]) == CPU
