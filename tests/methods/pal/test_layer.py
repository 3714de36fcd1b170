"""PALs against a plain computation, one head and one token after the other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pal_adapters.hooks.masks import CallMask
from pal_adapters.methods.pal.layer import PAL
from pal_adapters.methods.shared import default_hidden_size, pal_parameters
from pal_adapters.nn.bottleneck import Projections
from pal_adapters.nn.unit import UnitInputs
from tests import zoo

D, R, HEADS = 10, 6, 2


def slow(x: Tensor, w: dict[str, Tensor], keep: Tensor, *, heads: int, site: str) -> Tensor:
    """`TS(x)`, row by row, token by token, head by head, in double precision."""
    w = {k: v.detach().double() for k, v in w.items()}

    def lin(name: str, v: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ v + w.get(f"{name}.bias", torch.zeros(()))

    def gelu(v: Tensor) -> Tensor:
        return v * 0.5 * (1 + torch.erf(v / math.sqrt(2)))

    out = torch.zeros_like(x, dtype=torch.float64)
    for b in range(x.shape[0]):
        e = [lin("encoder", t.double()) for t in x[b]]
        q, k, v = ([lin(name, t) for t in e] for name in ("query", "key", "value"))
        size = q[0].shape[0] // heads
        for i in range(len(e)):
            mixed = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                seen = [j for j in range(len(e)) if keep[b, i, j]]
                scores = torch.stack([q[i][part] @ k[j][part] / math.sqrt(size) for j in seen])
                mixed.append(sum(p * v[j][part] for p, j in zip(scores.softmax(0), seen, strict=True)))
            together = torch.cat(mixed)
            together = gelu(together) if site == "middle" else together
            term = lin("decoder", together)
            term = gelu(term) if site == "output" else term
            out[b, i] = 2 * torch.sigmoid(w["rho"]) * term if "rho" in w else term
    return out


def build(**more: Any) -> PAL:
    unit = PAL(D, R, **{"num_heads": HEADS, "tied": False, **more}).eval()
    zoo.randomise(unit)
    return unit


def run(unit: PAL, x: Tensor, keep: Tensor | None = None, value: Tensor | None = None) -> Tensor:
    mask = CallMask(None if keep is None else keep[:, None], None, False, torch.device("cpu"))
    value = torch.zeros_like(x) if value is None else value
    return unit("residual", value, UnitInputs(x=x, raw=x, h=x, mask=mask, batch=x.shape[0]), unit.weights())


@pytest.mark.parametrize("site", ["output", "middle", "none"])
@pytest.mark.parametrize("lhuc", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_term(site: Any, lhuc: bool, bias: bool, heads: int) -> None:
    unit = build(activation_site=site, lhuc=lhuc, bias=bias, num_heads=heads)
    x = torch.randn(2, 4, D)
    keep = torch.rand(2, 4, 4) > 0.4
    keep[..., 0] = True
    actual = run(unit, x, keep)
    expected = slow(x, unit.weights(), keep, heads=heads, site=site)
    assert zoo.difference(actual, expected) < 1e-5
    assert float(expected.abs().max()) > 1e-2
    value = torch.randn_like(x)
    assert zoo.difference(run(unit, x, keep, value), value + actual) < 1e-6


@given(b=st.integers(1, 3), n=st.integers(1, 4), heads=st.sampled_from([1, 2, 3]))
@settings(max_examples=15, deadline=None)
def test_awkward_shapes(b: int, n: int, heads: int) -> None:
    unit, x = build(num_heads=heads), torch.randn(b, n, D)
    keep = torch.ones(b, n, n, dtype=torch.bool)
    expected = slow(x, unit.weights(), keep, heads=heads, site="output")
    assert zoo.difference(run(unit, x), expected) < 1e-5


def test_gelu_comes_after_the_decoder() -> None:
    """Its minimum is -0.17, so no component of the term is lower."""
    x = 5 * torch.randn(4, 6, D)
    assert run(build(), x).min() > -0.17
    assert run(build(activation_site="middle"), x).min() < -0.17


@pytest.mark.parametrize("reads", ["x", "raw", "h"])
def test_inputs(reads: Any) -> None:
    unit = build(reads=reads)
    assert unit.needs == (reads, "mask")
    parts = {name: torch.randn(2, 3, D) for name in ("x", "raw", "h")}
    actual = unit("residual", torch.zeros(2, 3, D), UnitInputs(**parts, batch=2), unit.weights())
    assert torch.equal(actual, run(unit, parts[reads]))


def test_gradients_equal_those_of_the_plain_computation() -> None:
    unit = build(lhuc=True)
    weights = unit.weights()
    x = torch.randn(2, 3, D, requires_grad=True)
    keep = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    actual = run(unit, x)
    expected = zoo.pal(x, weights, keep, heads=HEADS)
    weight = torch.randn(actual.shape)
    wanted = [x, *weights.values()]
    for a, b in zip(*(torch.autograd.grad((t * weight).sum(), wanted) for t in (actual, expected)), strict=True):
        assert zoo.difference(a, b) < 1e-5


def test_projections_shared_over_blocks_sum_their_gradients() -> None:
    shared = Projections(D, R)
    zoo.randomise(shared)
    units = []
    for _ in range(3):
        unit = PAL(D, R, num_heads=HEADS).eval()
        zoo.randomise(unit, seed=len(units))
        unit.share(shared)
        units.append(unit)
    assert all(u.weights()["encoder.weight"] is shared.encoder.weight for u in units)
    x = torch.randn(2, 3, D)
    sum(run(unit, x).sin().sum() for unit in units).backward()  # type: ignore[union-attr]
    total = shared.decoder.weight.grad
    parts = [torch.autograd.grad(run(unit, x).sin().sum(), shared.decoder.weight)[0] for unit in units]
    assert total is not None
    assert zoo.difference(total, sum(parts)) < 1e-6  # type: ignore[arg-type]
    assert units[0].query.weight is not units[1].query.weight


def test_dropout_is_only_on_the_probabilities() -> None:
    """With values of one and rows that sum to one, only dropout on the probabilities changes the sum."""
    unit = build(dropout=0.5, activation_site="none")
    with torch.no_grad():
        unit.value.weight.zero_()
        unit.value.bias.fill_(1.0)
        unit.decoder.weight.zero_()
        unit.decoder.weight[0, 0] = 1.0
        unit.decoder.bias.zero_()
    x = torch.randn(1, 5, D)
    assert zoo.difference(run(unit, x)[..., 0], torch.ones(1, 5)) < 1e-6
    unit.train()
    drawn = torch.stack([run(unit, x) for _ in range(2000)])
    assert drawn[..., 1:].abs().max() == 0  # no dropout after the attention
    assert abs(float(drawn[..., 0].detach().mean()) - 1) < 0.02
    assert drawn[..., 0].std() > 0.1
    assert torch.equal(build(dropout=0.5)("residual", x, UnitInputs(x=x), build().weights()), run(build(), x, value=x))


def test_initialisation() -> None:
    unit = PAL(200, 150, num_heads=6, tied=False, lhuc=True)
    unit.reset_parameters(identity=False)
    for layer in (unit.query, unit.key, unit.value, unit.encoder, unit.decoder):
        assert abs(layer.weight.std().item() - 0.02) < 1e-3
        assert not layer.bias.any()
    assert not unit.rho.any()  # type: ignore[union-attr]
    unit.reset_parameters(identity=True)
    assert not unit.decoder.weight.any()
    assert unit.encoder.weight.any()


def test_size_of_the_term_at_the_start() -> None:
    """The authors' initialisation: RMS 0.006 for 16 and 0.002 for 128 independent tokens."""
    torch.manual_seed(0)
    for tokens, expected in ((16, 0.006), (128, 0.002)):
        values = []
        for _ in range(3):
            unit = PAL(768, 204, num_heads=6, tied=False).eval()
            unit.reset_parameters(identity=False)
            values.append(run(unit, torch.randn(4, tokens, 768)).pow(2).mean().sqrt().item())
        assert abs(sum(values) / 3 - expected) < 0.0007


@pytest.mark.parametrize(
    ("width", "size", "depth", "parameters"),
    [(768, 204, 12, 1_819_836), (1024, 204, 24, 3_430_060), (1024, 264, 24, 5_579_080)],
)
def test_added_parameters(width: int, size: int, depth: int, parameters: int) -> None:
    assert pal_parameters(width, size, depth) == parameters
    units = [PAL(width, size, num_heads=6) for _ in range(depth)]
    counted = sum(p.numel() for u in units for p in u.parameters())
    assert counted + sum(p.numel() for p in Projections(width, size).parameters()) == parameters


@given(
    width=st.integers(8, 2048), depth=st.integers(1, 48), heads=st.sampled_from([1, 2, 3, 6, 8, 12]),
    base=st.integers(1000, 3_000_000_000),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_default_hidden_size(width: int, depth: int, heads: int, base: int) -> None:
    size = default_hidden_size(width, depth, base, heads)
    assert size % heads == 0
    if width in (768, 1024):
        return

    def ratio(r: int) -> float:
        per_task = 2 * width * r + r + width + 3 * depth * (r * r + r)
        return (base + 8 * per_task) / base

    assert ratio(size) >= 1.13 - 1e-9
    if size > heads:
        assert ratio(size - heads) < 1.13


def test_default_hidden_size_of_the_known_widths() -> None:
    assert default_hidden_size(768, 12, 109_482_240) == 204
    assert default_hidden_size(768, 3, 10**12) == 204
    assert default_hidden_size(1024, 24, 335_141_888) == 264
    assert default_hidden_size(768, 12, 109_482_240, 12) == 204
    # Where the number of heads does not divide it, the rule decides.
    assert default_hidden_size(768, 12, 109_482_240, 8) == 208
