"""Wide bottlenecks and their truncation, in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pal_adapters
from pal_adapters.fusion.truncation import cut_to_width
from pal_adapters.nn.bottleneck import Bottleneck, widen


def source(width: int, d: int = 10) -> Bottleneck:
    return Bottleneck(torch.randn(width, d), torch.randn(width), torch.randn(d, width), torch.randn(d))


@pytest.mark.parametrize("widths", [(3, 3, 3), (3, 1, 5)])
@pytest.mark.parametrize("channels", [1, 10])
def test_wide_is_the_weighted_sum(widths: tuple[int, ...], channels: int) -> None:
    sources = [source(w) for w in widths]
    omega = torch.randn(3, channels, requires_grad=True)
    x = torch.randn(2, 4, 10)
    wide = widen(sources, omega)
    assert wide.down.shape == (sum(widths), 10)
    expected = sum(
        omega[i] * (torch.relu(x @ s.down.T + s.down_bias) @ s.up.T + s.up_bias) for i, s in enumerate(sources)
    )
    found = wide(x, torch.relu)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    g = torch.randn_like(found)
    (a,), (b,) = torch.autograd.grad((found * g).sum(), omega), torch.autograd.grad((expected * g).sum(), omega)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def moments_of(wide: Bottleneck, x: Tensor) -> Tensor:
    h = torch.relu(x @ wide.down.T + wide.down_bias).double()
    h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
    return h.T @ h / len(x)


def test_the_reported_error_is_the_error() -> None:
    wide = widen([source(6), source(6)], torch.ones(2, 1))
    x = torch.randn(5000, 10)
    exact = wide(x, torch.relu)
    before = 0.0
    for width in (12, 9, 6, 3, 1):
        cut, error = cut_to_width(wide, moments_of(wide, x), width)
        assert cut.up.shape == (10, width)
        found = (cut(x, torch.relu) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert abs(found.item() - error) < 1e-3
        assert error >= before - 1e-6
        before = error
    assert cut_to_width(wide, moments_of(wide, x), 12)[1] < 1e-5


def test_units_that_are_copies_or_off_are_cut_for_free() -> None:
    one = source(4)
    off = source(3)._replace(up=torch.zeros(10, 3))
    wide = widen([one, one, off], torch.tensor([[0.5], [2.0], [1.0]]))
    x = torch.randn(3000, 10)
    cut, error = cut_to_width(wide, moments_of(wide, x), 4)
    assert error < 1e-4
    torch.testing.assert_close(cut(x, torch.relu), wide(x, torch.relu), atol=1e-2, rtol=1e-3)
    with_best = cut_to_width(wide, moments_of(wide, x), 3)[1]
    kept = [cut_to_width(one, moments_of(one, x), 3)[1]]
    # Better than dropping the smallest column of the up-projection.
    smallest = one.up.norm(dim=0).argmin()
    rest = [i for i in range(4) if i != smallest]
    dropped = one._replace(down=one.down[rest], down_bias=one.down_bias[rest], up=one.up[:, rest])
    scale = one(x, torch.relu).square().mean().sqrt()
    naive = (dropped(x, torch.relu) - one(x, torch.relu)).square().mean().sqrt() / scale
    assert kept[0] < naive
    assert with_best < 1.0


def test_a_source_that_is_off_goes_first() -> None:
    """Also where its units vary with those of the others, on few tokens."""
    x = torch.randn(20, 2) @ torch.randn(2, 10)
    sources = [source(5), source(7), source(3)]
    wide = widen(sources, torch.tensor([[0.8], [0.0], [-0.4]]))
    cut, error = cut_to_width(wide, moments_of(wide, x), 8)
    assert error < 1e-6
    torch.testing.assert_close(cut(x, torch.relu), wide(x, torch.relu), atol=1e-4, rtol=1e-4)


def test_a_model_without_adapters() -> None:
    with pytest.raises(pal_adapters.UnsupportedError, match="Linear has no adapters"):
        pal_adapters.fold(nn.Linear(2, 2), "a,b", name="c")
    with pytest.raises(pal_adapters.UnsupportedError, match="Linear has no adapters"):
        pal_adapters.fusion_regularization(nn.Linear(2, 2))
