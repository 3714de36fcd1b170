"""Houlsby bottlenecks and the variants of the PALs paper, against plain computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pal_adapters.hooks.masks import CallMask
from pal_adapters.methods.houlsby.layer import ACTIVATIONS, HoulsbyBottleneck, HoulsbyPAL, ParallelHoulsby
from pal_adapters.nn.bottleneck import Projections
from pal_adapters.nn.unit import UnitInputs
from tests import zoo

D, R = 10, 6


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


PLAIN = {
    "gelu_new": tanh_gelu,
    "gelu": zoo.gelu,
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
def test_bottleneck(activation: str, shape: tuple[int, int]) -> None:
    unit = HoulsbyBottleneck(D, 4, activation=activation)
    zoo.randomise(unit)
    u, w = torch.randn(*shape, D), unit.weights()
    expected = u + zoo.linear(PLAIN[activation](zoo.linear(u, w, "down")), w, "up")
    assert zoo.difference(unit("value", u, UnitInputs(), w), expected) < 1e-5


@pytest.mark.parametrize("std", [1e-2, 1e-3])
def test_bottleneck_initialisation(std: float) -> None:
    """Truncated at two standard deviations, which leaves 0.88 of the deviation."""
    unit = HoulsbyBottleneck(300, 200, init_std=std)
    unit.reset_parameters(identity=False)
    for layer in (unit.down, unit.up):
        assert layer.weight.abs().max() <= 2 * std
        assert layer.weight.abs().max() > 1.9 * std
        assert abs(layer.weight.std().item() / std - 0.88) < 0.02
        assert not layer.bias.any()
    u = torch.randn(2, 3, 300)
    assert zoo.difference(unit("value", u, UnitInputs(), unit.weights()), u) < 0.5
    unit.reset_parameters(identity=True)
    assert unit.down.weight.any()
    assert torch.equal(unit("value", u, UnitInputs(), unit.weights()), u)
    unit.to("meta").reset_parameters(identity=False)


def test_parallel_houlsby() -> None:
    unit = ParallelHoulsby(D, 4)
    zoo.randomise(unit)
    w, o1, o2, h = unit.weights(), *(torch.randn(2, 3, D) for _ in range(3))
    assert zoo.difference(unit("attention", o1, UnitInputs(h=h), w), o1 + zoo.low_rank(o1, w, "attention.")) < 1e-5
    assert zoo.difference(unit("residual", o2, UnitInputs(h=h), w), o2 + zoo.low_rank(h, w, "ffn.")) < 1e-5
    assert unit.sites == ("attention", "residual")


def test_houlsby_pal() -> None:
    unit = HoulsbyPAL(D, R, 4, num_heads=2).eval()
    shared = Projections(D, R)
    zoo.randomise(unit)
    zoo.randomise(shared)
    unit.share(shared)
    w, o1, o2, h = unit.weights(), *(torch.randn(2, 3, D) for _ in range(3))
    keep = torch.rand(2, 1, 3, 3) > 0.3
    keep[..., 0] = True
    inputs = UnitInputs(h=h, mask=CallMask(keep, None, False, torch.device("cpu")), batch=2)
    assert zoo.difference(unit("attention", o1, inputs, w), o1 + zoo.low_rank(o1, w, "attention.")) < 1e-5
    own = {k.removeprefix("pal."): v for k, v in w.items() if not k.startswith("attention.")}
    assert zoo.difference(unit("residual", o2, inputs, w), o2 + zoo.pal(h, own, keep)) < 1e-5
    # The bottleneck's projections are its own, the PAL's are the shared ones.
    assert w["encoder.weight"] is shared.encoder.weight
    assert w["attention.encoder.weight"] is unit.attention.encoder.weight


def test_parameters() -> None:
    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    assert 12 * count(ParallelHoulsby(768, 50)) == 1_862_832
    assert 24 * count(ParallelHoulsby(1024, 50)) == 4_966_752
    assert 12 * count(HoulsbyPAL(768, 156, 50)) + count(Projections(768, 156)) == 2_053_668
    assert 24 * count(HoulsbyPAL(1024, 156, 50)) + count(Projections(1024, 156)) == 4_567_468
    assert 2 * 12 * count(HoulsbyBottleneck(768, 64)) == 2_379_264
    assert 2 * 24 * count(HoulsbyBottleneck(1024, 64)) == 6_343_680
