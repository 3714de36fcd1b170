"""LHUC: one factor a channel between 0 and 2."""

from __future__ import annotations

import math

import pytest
import torch

from pal_adapters.methods.lhuc.layer import LHUC
from pal_adapters.nn.unit import UnitInputs
from tests import zoo


@pytest.mark.parametrize("site", ["output", "ffn"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
def test_factor(site: str, shape: tuple[int, int]) -> None:
    unit = LHUC(5, site=site)  # type: ignore[arg-type]
    assert unit.sites == (site,)
    assert unit.needs == ()
    with torch.no_grad():
        unit.rho.copy_(torch.tensor([0.0, 1.0, -1.0, 20.0, -20.0]))
    value = torch.randn(*shape, 5)
    actual = unit(site, value, UnitInputs(), unit.weights())
    factors = [2 / (1 + math.exp(-rho)) for rho in (0.0, 1.0, -1.0, 20.0, -20.0)]
    for channel, factor in enumerate(factors):
        assert zoo.difference(actual[..., channel], value[..., channel] * factor) < 1e-6


def test_one_vector_a_row() -> None:
    unit, value, rho = LHUC(3), torch.randn(4, 2, 3), torch.randn(4, 3)
    actual = unit("output", value, UnitInputs(), {"rho": rho})
    for row in range(4):
        assert (
            zoo.difference(actual[row], unit("output", value[row : row + 1], UnitInputs(), {"rho": rho[row]})[0]) == 0
        )


def test_initialisation() -> None:
    unit = LHUC(4000)
    unit.reset_parameters(identity=False)
    assert abs(unit.rho.std().item() - 0.02) < 1e-3
    unit.reset_parameters(identity=True)
    assert not unit.rho.any()
    meta = LHUC(4)
    meta.to("meta").reset_parameters(identity=False)


def test_gradient() -> None:
    """`dr/drho = 1/2` at the start."""
    unit, value = LHUC(3), torch.randn(2, 2, 3)
    unit("output", value, UnitInputs(), unit.weights()).sum().backward()
    assert unit.rho.grad is not None
    assert zoo.difference(unit.rho.grad, value.sum((0, 1)) / 2) < 1e-6


def test_parameters() -> None:
    assert 12 * LHUC(768).rho.numel() == 9_216
    assert 24 * LHUC(1024).rho.numel() == 24_576
