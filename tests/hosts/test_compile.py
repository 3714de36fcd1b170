"""`torch.compile(fullgraph=True)`: equal values and gradients, and no second compilation for a second batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from tests import zoo
from tests.methods import RECORDS, makers, names
from tests.zoo import BY_NAME

pytestmark = [
    *zoo.HOST_WARNINGS,
    # torch 2.13 while it compiles the vmap in which transformers 4.57 builds its masks
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
]
CONFIGS = makers("peft", dropout=False)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def adapted(name: str, method: str, **changes: Any) -> Any:
    model = get_peft_model(BY_NAME[name].build(**changes), CONFIGS[method]()).eval()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    for n, parameter in trained:
        zoo.randomise(nn.ParameterList([parameter]), seed=len(n))
    return model


def run(function: Any, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    (value,) = list(zoo.outputs_of(function(**inputs)).values())[:1]
    (value * torch.linspace(0, 1, value.numel()).view(value.shape)).sum().backward()
    return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check(name: str, method: str, backend: str, tolerance: float, **changes: Any) -> None:
    model = adapted(name, method, **changes)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    first = BY_NAME[name].inputs()
    second = {k: v.flip(0) for k, v in first.items()}
    for inputs in (first, second):
        value, gradients = run(model, model, inputs)
        actual, actual_gradients = run(compiled, model, inputs)
        assert zoo.difference(actual, value) <= tolerance
        assert actual_gradients.keys() == gradients.keys()
        assert max(zoo.difference(actual_gradients[n], g) for n, g in gradients.items()) <= tolerance
        assert counter.frame_count == 1


@pytest.mark.parametrize("method", CONFIGS)
def test_values_and_gradients(method: str) -> None:
    # One block is enough unless blocks share weights.
    check("bert", method, "aot_eager", 1e-6, num_hidden_layers=2 if RECORDS[method].shares else 1)


@pytest.mark.parametrize("method", names("peft", lambda record: record.attends))
def test_values_and_gradients_in_a_decoder(method: str) -> None:
    check("gpt2", method, "aot_eager", 1e-6, n_layer=2 if RECORDS[method].shares else 1)


@pytest.mark.parametrize(
    ("name", "method", "depth"),
    [
        ("mbart", "pal", dict(encoder_layers=1, decoder_layers=1)),
        ("llama", "houlsby_pal", dict(num_hidden_layers=1)),
    ],
)
def test_other_places(name: str, method: str, depth: dict[str, int]) -> None:
    """A term after the block, and terms at both sublayers."""
    check(name, method, "aot_eager", 1e-6, **depth)


@pytest.mark.slow
def test_inductor() -> None:
    check("bert", "pal", "inductor", 2e-5, num_hidden_layers=1)


def test_decoding_with_a_static_cache() -> None:
    """A step is compiled once, or once more when a length turns out to change (the host's layers do that as well)."""
    model = adapted("llama", "pal")
    ids = BY_NAME["llama"].inputs(padding=False)["input_ids"]
    ids = torch.cat([ids, ids.flip(1)], dim=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    cache = StaticCache(config=model.config, max_cache_len=24)

    def step(function: Any, start: int, end: int) -> Tensor:
        mask = (torch.arange(24) < end).long().expand(ids.shape[0], -1)
        more = {} if zoo.V5 else {"cache_position": torch.arange(start, end)}
        positions = torch.arange(start, end)[None]
        part = ids[:, start:end]
        with torch.no_grad():
            return function(
                input_ids=part, attention_mask=mask, position_ids=positions, **{zoo.CACHE: cache}, **more
            ).logits

    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    parts = [step(model, 0, 6), *(step(compiled, i, i + 1) for i in range(6, 14))]
    assert zoo.difference(torch.cat(parts, 1), expected[:, :14]) <= 1e-5
    assert counter.frame_count <= 2
