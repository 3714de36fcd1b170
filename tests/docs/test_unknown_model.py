"""The interface of MPNet in the docs of `adapters`: the host's bottleneck and a PAL against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import plain
from tests.hosts.adapters import reference

from .test_snippets import snippets
from .tiny_mpnet import save_tiny_mpnet


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the snippet defines, the adapters with random weights."""
    pytest.importorskip("adapters")
    monkeypatch.chdir(tmp_path)
    save_tiny_mpnet("mpnet")
    found: dict[str, Any] = {}
    (code,) = (text for text in snippets("docs/adapters.md") if "AdapterModelInterface" in text)
    exec(code, found)
    torch.manual_seed(1)
    for name, parameter in found["model"].named_parameters():
        if "rte" in name or "mrpc" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    found["model"].eval()
    return found


def run(model: Any, term: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The last states by the model, and by its blocks with `term(block number, x, u, mask)` before the last norm."""
    ids = torch.arange(5, 19).view(2, 7)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    model.set_active_adapters(None)
    x = model.embeddings(input_ids=ids)
    additive = model.get_extended_attention_mask(mask, ids.shape)
    bias = model.encoder.compute_position_bias(x)
    for number, block in enumerate(model.encoder.layer):
        h = block.attention(x, additive, position_bias=bias)[0]
        o = block.output.dense(block.intermediate(h))
        norm = block.output.LayerNorm
        x = norm(h + o + term(number, x, norm(h + o), additive))
    return found, x


def test_bottleneck(names: dict[str, Any]) -> None:
    model = names["model"]
    model.set_active_adapters("mrpc")
    places = [block.output_adapters.adapters["mrpc"] for block in model.encoder.layer]

    def term(number: int, x: torch.Tensor, u: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        place = places[number]
        return place.adapter_up(torch.relu(place.adapter_down[0](u)))

    found, expected = run(model, term)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_pal(names: dict[str, Any]) -> None:
    model = names["model"]
    model.set_active_adapters("rte")
    weights = reference.weights_of(model, "rte", "pal")

    def term(number: int, x: torch.Tensor, u: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return plain.pal(x, weights[number], (mask == 0).expand(-1, 1, x.shape[1], -1), heads=6)

    found, expected = run(model, term)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
