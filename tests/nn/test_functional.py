"""One set of weights for all rows, or one set a row: both against plain einsum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pal_adapters.nn.functional import attend, layer_norm, linear, masked_mean, merge_heads, scale, split_heads

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@given(b=st.integers(1, 4), n=st.integers(1, 5), i=st.integers(1, 6), o=st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_linear(dtype: torch.dtype, tolerance: float, bias: bool, b: int, n: int, i: int, o: int) -> None:
    x, weight = torch.randn(b, n, i).to(dtype), torch.randn(b, o, i).to(dtype)
    vector = torch.randn(b, o).to(dtype) if bias else None
    expected = torch.einsum("bni,boi->bno", x.double(), weight.double())
    if vector is not None:
        expected = expected + vector.double()[:, None]
    rows = linear(x, weight, vector)
    assert rows.dtype == dtype
    assert difference(rows, expected) <= tolerance * (1 + i)
    for row in range(b):
        alone = linear(x[row : row + 1], weight[row], None if vector is None else vector[row])
        assert difference(alone[0], expected[row]) <= tolerance * (1 + i)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_computes_in_the_dtype_of_the_weights(rows: bool, bias: bool) -> None:
    x = torch.randn(2, 3, 4).bfloat16()
    weight = torch.randn(2, 5, 4) if rows else torch.randn(5, 4)
    vector = (torch.randn(2, 5) if rows else torch.randn(5)) if bias else None
    y = linear(x, weight, vector)
    assert y.dtype == torch.float32
    assert torch.equal(y, linear(x.float(), weight, vector))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight, vector)
    assert difference(y, linear(x.float(), weight, vector)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale(dtype: torch.dtype) -> None:
    x, one, rows = torch.randn(3, 4, 5).to(dtype), torch.randn(5), torch.randn(3, 5)
    assert torch.equal(scale(x, one), (x.float() * one).to(dtype))
    assert torch.equal(scale(x, rows), torch.stack([(a.float() * w).to(dtype) for a, w in zip(x, rows, strict=True)]))
    assert scale(x, one).dtype == dtype


def test_scale_keeps_small_steps_in_bfloat16() -> None:
    """A factor of 1.003 is 1 in bfloat16, but not once it is multiplied."""
    x = torch.full((1, 1, 1), 3.0, dtype=torch.bfloat16)
    assert scale(x, torch.tensor([1.003])).item() == 3.015625
    assert scale(x, torch.tensor([1.003]).bfloat16()).item() == 3.0


@given(b=st.integers(1, 4), n=st.integers(1, 4), d=st.integers(2, 9), eps=st.sampled_from([1e-12, 1e-5, 0.1]))
@settings(max_examples=25, deadline=None)
def test_layer_norm(b: int, n: int, d: int, eps: float) -> None:
    x, weight, bias = torch.randn(b, n, d) + torch.arange(d), torch.randn(b, d), torch.randn(b, d)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    expected = (x - mean) / (var + eps).sqrt() * weight[:, None] + bias[:, None]
    assert difference(layer_norm(x, weight, bias, eps), expected) < 1e-4
    for row in range(b):
        assert difference(layer_norm(x[row : row + 1], weight[row], bias[row], eps)[0], expected[row]) < 1e-4


@given(b=st.integers(1, 3), n=st.integers(1, 4), h=st.integers(1, 4), k=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_heads(b: int, n: int, h: int, k: int) -> None:
    x = torch.randn(b, n, h * k)
    heads = split_heads(x, h)
    assert heads.shape == (b, h, n, k)
    for head in range(h):
        assert torch.equal(heads[:, head], x[..., head * k : (head + 1) * k])
    assert torch.equal(merge_heads(heads), x)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bhqx,bhkx->bhqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.einsum("bhqk,bhkx->bhqx", scores.softmax(-1), v)


@pytest.mark.parametrize("form", ["none", "bool", "additive", "causal", "broadcast"])
def test_attend(form: str) -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    triangle = torch.ones(5, 5, dtype=torch.bool).tril()
    keep = triangle & (torch.rand(2, 1, 5, 5) > 0.3) | torch.eye(5, dtype=torch.bool)
    bias = torch.randn(2, 1, 5, 5)
    masks = {"none": None, "bool": keep, "additive": bias, "causal": None, "broadcast": keep.any(2, keepdim=True)}
    actual = attend(q, k, v, masks[form], is_causal=form == "causal", dropout=0.0)
    expected = plain(q, k, v, triangle[None, None] if form == "causal" else masks[form])
    assert difference(actual, expected) < 1e-5
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (actual, expected)), strict=True):
        assert difference(a, b) < 1e-5


def test_attend_with_more_keys_than_queries() -> None:
    q, k, v = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    mask = torch.rand(2, 1, 2, 5) > 0.3
    mask[..., 0] = True
    assert difference(attend(q, k, v, mask, is_causal=False, dropout=0.0), plain(q, k, v, mask)) < 1e-5


def test_attend_drops_out_probabilities() -> None:
    """Each probability is 0 or divided by what is kept, whatever the values are."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4), torch.eye(6)[None, None]
    probabilities = plain(q, k, v, None)
    dropped = attend(q, k, v, None, is_causal=False, dropout=0.5)
    ratio = dropped / probabilities
    assert ((ratio.abs() < 1e-6) | ((ratio - 2).abs() < 1e-4)).all()
    assert 0 < (ratio < 1).float().mean() < 1
    torch.manual_seed(0)
    mean = torch.stack([attend(q, k, v, None, is_causal=False, dropout=0.5) for _ in range(3000)]).mean(0)
    assert difference(mean, probabilities) < 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_masked_mean(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    tokens, visible = torch.randn(3, 5, 4).to(dtype), torch.rand(rows, 2, 5) > 0.4
    visible[0, 1] = False
    actual = masked_mean(tokens, visible)
    assert actual.dtype == dtype
    for b in range(3):
        for i in range(2):
            seen = [tokens[b, j].double() for j in range(5) if visible[b % rows, i, j]]
            expected = sum(seen) / len(seen) if seen else torch.zeros(4)
            assert difference(actual[b, i], torch.as_tensor(expected)) <= 5 * tolerance
    assert difference(masked_mean(tokens, None), tokens.double().mean(1, keepdim=True)) <= 5 * tolerance
    assert torch.equal(masked_mean(tokens, torch.zeros(1, 2, 5, dtype=torch.bool)), torch.zeros(3, 2, 4).to(dtype))
