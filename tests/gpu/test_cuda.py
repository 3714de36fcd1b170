"""On a CUDA device: values as on the CPU, bfloat16, attention kernels, mixed batches, waits, graphs.

`tests/conftest.py` hides the devices from all other tests: run `CUDA_VISIBLE_DEVICES=0 pytest -m gpu`, or
`benchmarks/gpu.sh`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("peft")

from peft import get_peft_model
from transformers import BertConfig, BertModel

import pal_adapters
from tests import zoo

CUDA = torch.cuda.is_available()
pytestmark = [
    *zoo.HOST_WARNINGS,
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="there is no CUDA device"),
]
CONFIGS: dict[str, Any] = {
    "pal": lambda: pal_adapters.PALPeftConfig(hidden_size=48, dropout=0.0),
    "low_rank": lambda: pal_adapters.LowRankPeftConfig(hidden_size=16),
    "houlsby": lambda: pal_adapters.HoulsbyPeftConfig(hidden_size=16),
}
TASKS = ("a", "b", "c")


def model_of(method: str, blocks: int = 2) -> Any:
    config = BertConfig(
        hidden_size=96, num_hidden_layers=blocks, num_attention_heads=4, intermediate_size=128, vocab_size=50,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: Any = get_peft_model(BertModel(config), CONFIGS[method](), adapter_name="a")
    for name in TASKS[1:]:
        model.add_adapter(name, CONFIGS[method]())
    for name, parameter in model.named_parameters():
        if any(f".{task}." in name for task in TASKS):
            zoo.randomise(nn.ParameterList([parameter]), seed=len(name))
            parameter.requires_grad_(True)
    return model.eval()


def inputs(rows: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(50, (rows, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def on(device: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in given.items()}


def run(model: Any, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**given).last_hidden_state.float()
    (out * torch.linspace(0, 1, out.shape[-1], device=out.device)).sum().backward()
    return out.detach().cpu(), {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("counts", [None, (2, 2, 2), (4, 3, 4), (5, 1, 1), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("method", CONFIGS)
def test_values_and_gradients_as_on_the_cpu(method: str, counts: tuple[int, ...] | None) -> None:
    """One task, and mixed batches of equal, padded and unequal tasks, and of hardly more examples than tasks."""
    cpu = model_of(method)
    cuda = copy.deepcopy(cpu).to("cuda")
    names = [name for name, count in zip(TASKS, counts or (), strict=False) for _ in range(count)][::-1]
    given = inputs(len(names) or 6)
    more = {"adapter_names": names} if names else {}
    value, gradients = run(cpu, {**given, **more})
    actual, actual_gradients = run(cuda, {**on("cuda", given), **more})
    torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-4)
    assert actual_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("method", CONFIGS)
def test_bfloat16_with_each_kernel(method: str, backend: SDPBackend) -> None:
    model = model_of(method)
    given = inputs()
    given.pop("attention_mask")  # the flash kernel takes no mask
    expected, _ = run(model, given)
    with sdpa_kernel(backend):
        actual, _ = run(model.to(device="cuda", dtype=torch.bfloat16), on("cuda", given))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.15)


@pytest.mark.parametrize("method", CONFIGS)
def test_more_blocks_wait_for_the_device_no_more_often(method: str) -> None:
    """The index tensors are copied to the device once per pass; nothing is read back from it."""
    found = []
    for blocks in (1, 3):
        model = model_of(method, blocks).to("cuda")
        ids = inputs()["input_ids"].to("cuda")
        with torch.no_grad(), warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(input_ids=ids, adapter_names=list("abcabc"))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(sum("synchronizing CUDA operation" in str(w.message) for w in waits))
    assert found[0] == found[1]
    assert found[0] <= 8


@pytest.mark.parametrize("method", CONFIGS)
def test_a_graph_captures_the_forward_pass(method: str) -> None:
    model = model_of(method).to("cuda")
    given = on("cuda", inputs())
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(input_ids=given["input_ids"])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(input_ids=given["input_ids"]).last_hidden_state
        given["input_ids"].copy_(given["input_ids"].flip(0))
        graph.replay()
        torch.testing.assert_close(captured, model(input_ids=given["input_ids"]).last_hidden_state)
