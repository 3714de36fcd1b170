"""Low-rank layers against a plain computation in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pal_adapters.methods.low_rank.layer import LowRank
from pal_adapters.nn.bottleneck import project
from pal_adapters.nn.unit import UnitInputs
from tests import zoo

D, R = 10, 4


def plain(x: Tensor, w: dict[str, Tensor], site: str) -> Tensor:
    w = {k: v.detach().double() for k, v in w.items()}
    inner = zoo.linear(x.double(), w, "encoder")
    outer = zoo.linear(zoo.gelu(inner) if site == "middle" else inner, w, "decoder")
    outer = zoo.gelu(outer) if site == "output" else outer
    return 2 * torch.sigmoid(w["rho"]) * outer if "rho" in w else outer


@pytest.mark.parametrize("site", ["middle", "output", "none"])
@pytest.mark.parametrize("lhuc", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (4, 1)])
def test_term(site: Any, lhuc: bool, bias: bool, shape: tuple[int, int]) -> None:
    unit = LowRank(D, R, activation_site=site, bias=bias, lhuc=lhuc)
    zoo.randomise(unit)
    x, value = torch.randn(*shape, D), torch.randn(*shape, D)
    actual = unit("residual", value, UnitInputs(x=x), unit.weights())
    expected = value + plain(x, unit.weights(), site)
    assert zoo.difference(actual, expected) < 1e-5
    assert zoo.difference(actual, value) > 1e-2


def test_inputs() -> None:
    x, raw = torch.randn(1, 2, D), torch.randn(1, 2, D)
    for reads in ("x", "raw"):
        unit = LowRank(D, R, reads=reads)  # type: ignore[arg-type]
        zoo.randomise(unit)
        assert unit.needs == (reads,)
        actual = unit("residual", torch.zeros(1, 2, D), UnitInputs(x=x, raw=raw), unit.weights())
        assert zoo.difference(actual, plain(raw if reads == "raw" else x, unit.weights(), "middle")) < 1e-5


def test_gradients() -> None:
    unit = LowRank(D, R, lhuc=True)
    zoo.randomise(unit)
    x = torch.randn(2, 3, D, requires_grad=True)
    wanted = [x, *unit.weights().values()]
    actual = unit("residual", torch.zeros(2, 3, D), UnitInputs(x=x), unit.weights())
    expected = zoo.low_rank(x, unit.weights())
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), wanted) for t in (actual, expected)), strict=False):
        assert zoo.difference(a, b) < 1e-5


def test_bottleneck_with_a_prefix() -> None:
    unit = LowRank(D, R)
    zoo.randomise(unit)
    x = torch.randn(1, 2, D)
    renamed = {f"ffn.{k}": v for k, v in unit.weights().items()}
    assert torch.equal(project(x, renamed, "ffn."), project(x, unit.weights()))


def test_initialisation() -> None:
    unit = LowRank(300, 200, lhuc=True)
    unit.reset_parameters(identity=False)
    assert abs(unit.encoder.weight.std().item() - 0.02) < 1e-3
    assert abs(unit.decoder.weight.std().item() - 0.02) < 1e-3
    assert not unit.encoder.bias.any()
    assert not unit.rho.any()  # type: ignore[union-attr]
    unit.reset_parameters(identity=True)
    assert not unit.decoder.weight.any()
    assert unit.encoder.weight.any()


def test_size_of_the_term_at_the_start() -> None:
    """The authors' initialisation: RMS 0.066 for independent tokens of unit variance."""
    torch.manual_seed(0)
    unit = LowRank(768, 100)
    unit.reset_parameters(identity=False)
    term = unit("residual", torch.zeros(8, 64, 768), UnitInputs(x=torch.randn(8, 64, 768)), unit.weights())
    assert abs(term.pow(2).mean().sqrt().item() - 0.066) < 0.004


def test_parameters() -> None:
    assert 12 * sum(p.numel() for p in LowRank(768, 100).parameters()) == 1_853_616
    assert 24 * sum(p.numel() for p in LowRank(1024, 100).parameters()) == 4_942_176
