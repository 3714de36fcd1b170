"""Masks in every form that blocks get: equal to one explicit table of who sees whom."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import get_peft_model
from torch.nn.attention.flex_attention import create_block_mask

from pal_adapters import PALPeftConfig, UnsupportedError
from pal_adapters.hooks.masks import CallMask, normalise_mask
from pal_adapters.nn.functional import attend
from tests import zoo
from tests.zoo import BY_NAME

pytestmark = zoo.HOST_WARNINGS
CPU = torch.device("cpu")
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)]


def table(q: int, k: int, *, causal: bool, padding: Tensor | None = None, window: int | None = None) -> Tensor:
    """`[b, q, k]`, position by position."""
    rows = 1 if padding is None else padding.shape[0]
    keep = torch.zeros(rows, q, k, dtype=torch.bool)
    for b, i, j in itertools.product(range(rows), range(q), range(k)):
        here = i + k - q
        seen = not causal or j <= here
        seen = seen and (window is None or j > here - window)
        keep[b, i, j] = seen and (padding is None or bool(padding[b, j]))
    return keep


def plain(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q.double() @ k.double().transpose(2, 3)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~keep[:, None], -1e30).softmax(-1) @ v.double()


def draw(q_len: int, k_len: int, dtype: torch.dtype = torch.float32, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(rows, 2, n, 4).to(dtype) for n in (q_len, k_len, k_len))
    return q, k, v


def check(mask: Any, keep: Tensor, *, causal: bool, q_len: int, k_len: int, window: int | None = None) -> None:
    q, k, v = draw(q_len, k_len)
    ready, is_causal = normalise_mask(mask, q_len=q_len, kv_len=k_len, causal=causal, device=CPU, window=window)
    assert ready is None or not is_causal
    actual = attend(q, k, v, ready, is_causal=is_causal, dropout=0.0)
    some = keep.any(-1).expand(3, -1)  # a query that sees nothing has no right answer
    expected = plain(q, k, v, keep)
    assert (actual.double() - expected).abs().amax((1, 3)).masked_fill(~some, 0).max() < 1e-5


PADDING = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
MIN = torch.finfo(torch.float32).min


def additive(keep: Tensor, dtype: torch.dtype, low: float) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, low).to(dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len", [1, 2, 5])
def test_none(causal: bool, q_len: int) -> None:
    check(None, table(q_len, 5, causal=causal), causal=causal, q_len=q_len, k_len=5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len", [1, 2, 5])
@pytest.mark.parametrize(
    "form", ["long", "int", "bool", "float", "negative float", "float all real"], ids=lambda f: f.replace(" ", "_")
)
def test_two_dimensions(form: str, q_len: int, causal: bool) -> None:
    """Flash attention and DistilBERT: one number a token."""
    padding = torch.ones_like(PADDING) if form == "float all real" else PADDING
    mask = {
        "long": padding.long(), "int": padding.int() * 7, "bool": padding.bool(), "float": padding.float(),
        "negative float": additive(padding.bool(), torch.float32, -10000.0), "float all real": padding.float(),
    }[form]  # fmt: skip
    check(mask, table(q_len, 5, causal=causal, padding=padding), causal=causal, q_len=q_len, k_len=5)


@given(
    q=st.integers(1, 5), more=st.integers(0, 4), causal=st.booleans(), window=st.one_of(st.none(), st.integers(1, 6)),
    form=st.sampled_from(["none", "keys", "keys, float", "bool", "fp32", "bf16", "-inf", "-10000", "heads", "flex"]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_who_sees_whom(q: int, more: int, causal: bool, window: int | None, form: str) -> None:
    """`visible` of every form of mask is the table itself."""
    k = q + more
    padding = torch.rand(3, k) > 0.3
    padding[:, -1] = True
    only_keys = form in ("none", "keys", "keys, float")
    window = window if causal and only_keys else None
    keep = table(q, k, causal=causal, padding=None if form == "none" else padding, window=window)
    whole = keep[:, None]
    mask: Any = {
        "none": None, "keys": padding, "keys, float": padding.float(), "bool": whole,
        "fp32": additive(whole, torch.float32, MIN), "bf16": additive(whole, torch.bfloat16, MIN),
        "-inf": additive(whole, torch.float32, -torch.inf), "-10000": additive(whole, torch.bfloat16, -10000.0),
        "heads": (-3 * torch.rand(1, 4, q, k)).masked_fill(~whole, MIN),
    }.get(form)  # fmt: skip
    if form == "flex":
        mask = create_block_mask(lambda b, h, i, j: whole[b, 0, i, j], 3, 1, q, k, device="cpu")
    call = CallMask(mask, None, causal, CPU, window=window)
    found = call.visible(q, k)
    everything = torch.ones(1, q, k, dtype=torch.bool) if found is None else found
    assert everything.dtype == torch.bool
    assert torch.equal(everything.expand(3, q, k), keep.expand(3, q, k))
    rows = torch.tensor([2, 0, 2])
    chosen = call.select(rows).visible(q, k)
    if chosen is not None:
        assert torch.equal(chosen.expand(3, q, k), keep.expand(3, q, k)[rows])


@pytest.mark.parametrize("dimensions", [3, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["fp32", "bf16", "fp16", "inf", "-10000", "bool", "int"])
def test_three_and_four_dimensions(form: str, causal: bool, dimensions: int) -> None:
    keep = table(5, 5, causal=causal, padding=PADDING)
    mask = {
        "fp32": additive(keep, torch.float32, MIN), "bf16": additive(keep, torch.bfloat16, MIN),
        "fp16": additive(keep, torch.float16, torch.finfo(torch.float16).min), "inf": additive(keep,
        torch.float32, -torch.inf),
        "-10000": additive(keep, torch.float32, -10000.0), "bool": keep, "int": keep.int(),
    }[form]  # fmt: skip
    check(mask if dimensions == 3 else mask[:, None], keep, causal=causal, q_len=5, k_len=5)


@pytest.mark.parametrize("form", ["fp32", "bool"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_that_broadcast(form: str, causal: bool) -> None:
    keep = table(5, 5, causal=causal, padding=PADDING)
    keys = PADDING.bool()[:, None, None, :]  # over the queries: causality is still to be applied
    check(additive(keys, torch.float32, MIN) if form == "fp32" else keys, keep, causal=causal, q_len=5, k_len=5)
    triangle = table(5, 5, causal=True)[:, None]  # over the rows
    check(additive(triangle, torch.float32, MIN) if form == "fp32" else triangle, triangle[:, 0], causal=True,
          q_len=5, k_len=5)  # fmt: skip


@given(
    q=st.integers(1, 6),
    more=st.integers(0, 5),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 12)),
    padded=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_windows(q: int, more: int, causal: bool, window: int | None, padded: bool, data: st.DataObject) -> None:
    """None and two dimensions do not tell the window, which is then applied here."""
    k = q + more
    rows = st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=3, max_size=3)
    padding = torch.tensor(data.draw(rows)) if padded else None
    window = window if causal else None
    check(
        padding,
        table(q, k, causal=causal, padding=padding, window=window),
        causal=causal,
        q_len=q,
        k_len=k,
        window=window,
    )


def test_static_caches_have_masks_that_are_too_long() -> None:
    keep = table(2, 5, causal=True, padding=PADDING)
    longer = torch.cat([keep, torch.zeros(3, 2, 4, dtype=torch.bool)], dim=-1)
    check(longer[:, None], keep, causal=True, q_len=2, k_len=5)
    check(torch.cat([longer.new_ones(3, 3, 9), longer], dim=1)[:, None], keep, causal=True, q_len=2, k_len=5)


@pytest.mark.parametrize("causal", [False, True])
def test_flex_block_mask(causal: bool) -> None:
    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return PADDING.bool()[b, j] & ((j <= i) if causal else (j >= 0))

    mask = create_block_mask(visible, 3, 1, 5, 5, device="cpu")
    check(mask, table(5, 5, causal=causal, padding=PADDING), causal=causal, q_len=5, k_len=5)


def test_position_bias_in_the_mask() -> None:
    """ALiBi and relative positions differ from head to head: what they hide counts, what they add does not."""
    keep = table(5, 5, causal=True, padding=PADDING)
    bias = -torch.rand(1, 4, 5, 5) * 3
    mask = bias.masked_fill(~keep[:, None], MIN)
    check(mask, keep, causal=True, q_len=5, k_len=5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("text", "type str"),
        (torch.ones(5), r"shape \[5\]"),
        (torch.ones(3, 1, 1, 5, 5), r"shape \[3, 1, 1, 5, 5\]"),
        (torch.ones(3, 4, 5, 5, dtype=torch.bool), "differs from head to head"),
        (torch.ones(3, 5, 1, 5), "differs from head to head"),
    ],
)
def test_what_is_not_supported(mask: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        normalise_mask(mask, q_len=5, kv_len=5, causal=False, device=CPU)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("form", ["bool", "fp32", "inf", "same", "sum"])
def test_a_row_that_sees_nothing_is_not_nan(dtype: torch.dtype, tolerance: float, form: str) -> None:
    keep = table(5, 5, causal=True, padding=PADDING)
    keep[1] = False
    q, k, v = draw(5, 5, dtype)
    q, k = q * 20, k * 20  # large scores, so that a sum with the dtype's minimum would overflow
    q.requires_grad_()
    mask = {
        "bool": keep, "fp32": additive(keep, torch.float32, MIN), "inf": additive(keep, torch.float32, -torch.inf),
        "same": additive(keep, dtype, torch.finfo(dtype).min), "sum": additive(keep, torch.float32, MIN) * 2,
    }[form][:, None]  # fmt: skip
    ready, _ = normalise_mask(mask, q_len=5, kv_len=5, causal=True, device=CPU)
    actual = attend(q, k, v, ready, is_causal=False, dropout=0.0)
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    (gradient,) = torch.autograd.grad(actual.float().sum(), q)
    assert gradient.isfinite().all()
    expected = plain(q, k, v, keep)
    some = keep.any(-1)
    assert (actual.double() - expected).abs().amax((1, 3))[some].max() < tolerance * 10


# `CallMask`


def keeps(mask: CallMask, q_len: int, k_len: int, rows: int) -> Tensor:
    ready, is_causal = mask(q_len, k_len)
    if ready is None:
        return table(q_len, k_len, causal=is_causal).expand(rows, -1, -1)
    ready = ready if ready.dtype == torch.bool else ready > -1e20
    return ready[:, 0].expand(rows, q_len, k_len)


def test_two_masks_of_clip() -> None:
    """transformers 4.57 gives its text tower padding and causality apart, the first one often as None."""
    keep, triangle = table(5, 5, causal=True, padding=PADDING), additive(table(5, 5, causal=True), torch.float32, MIN)
    padding = PADDING.bool()[:, None, None, :].expand(3, 1, 5, 5)
    for first in (padding, additive(padding, torch.float32, MIN), PADDING):
        assert torch.equal(keeps(CallMask(first, triangle[:, None], False, CPU), 5, 5, 3), keep)
    alone = CallMask(None, triangle[:, None], False, CPU)
    assert torch.equal(keeps(alone, 5, 5, 1), table(5, 5, causal=True))


def test_rows_of_a_mask() -> None:
    mask = CallMask(PADDING, None, True, CPU)
    keep = table(5, 5, causal=True, padding=PADDING)
    for rows in ([2, 0], [1], [0, 1, 2, 2, 1]):
        assert torch.equal(keeps(mask.select(torch.tensor(rows)), 5, 5, len(rows)), keep[rows])
    # A host that repeats the batch as a whole (`Parallel`) repeats its rows.
    assert torch.equal(keeps(mask.select(torch.arange(6)), 5, 5, 6), keep.repeat(2, 1, 1))
    shared = CallMask(table(5, 5, causal=True)[:, None], None, True, CPU).select(torch.tensor([2, 1]))
    assert torch.equal(keeps(shared, 5, 5, 2), table(5, 5, causal=True).expand(2, -1, -1))


@pytest.mark.parametrize(
    "mask", [None, PADDING, table(5, 5, causal=True, padding=PADDING)[:, None]], ids=["none", "2d", "4d"]
)
def test_tokens_of_a_mask(mask: Tensor | None) -> None:
    keep = table(5, 5, causal=True, padding=None if mask is None else PADDING).expand(3, -1, -1)
    whole = CallMask(mask, None, True, CPU)
    assert torch.equal(keeps(whole.slice_tokens(1, 4, 5), 3, 3, 3), keep[:, 1:4, 1:4])
    part = whole.slice_tokens(1, 5, 5).slice_tokens(1, 3, 4)  # a part of a part
    assert torch.equal(keeps(part, 2, 2, 3), keep[:, 2:4, 2:4])
    assert torch.equal(keeps(part.select(torch.tensor([1])), 2, 2, 1), keep[1:2, 2:4, 2:4])


# In models


# transformers 4.57 has no sdpa for T5, 5 has none for Gemma 2; Falcon's two differ by themselves where it has ALiBi.
IMPLEMENTATIONS = (
    ["bert", "distilbert", "esm", "modernbert", "gpt2", "llama", "mistral", "qwen3", "gemma3", "falcon", "opt",
    "bart", "clip", "vit"]
    + (["t5"] if zoo.V5 else ["gemma2"])
)  # fmt: skip


@pytest.mark.parametrize("host", [BY_NAME[name] for name in IMPLEMENTATIONS], ids=str)
@pytest.mark.parametrize("padding", [True, False])
def test_eager_and_sdpa_are_equal(host: zoo.Host, padding: bool) -> None:
    values = []
    for implementation in ("eager", "sdpa"):
        model = host.build(attn_implementation=implementation)
        adapted = get_peft_model(model, PALPeftConfig(hidden_size=12, num_heads=2)).eval()
        for name, parameter in adapted.named_parameters():
            if ".pal." in name:
                zoo.randomise(nn.ParameterList([parameter]), seed=len(name))
        inputs = host.inputs(padding=padding)
        if not padding:
            inputs.pop("attention_mask", None)
        with torch.no_grad():
            values.append(zoo.outputs_of(adapted(**inputs)))
    for name, value in values[0].items():
        assert zoo.difference(values[1][name], value, host.real(inputs, name)) < 5e-5


@pytest.mark.parametrize("form", ["float", "bool"])
def test_mask_of_the_user_with_four_dimensions(form: str) -> None:
    """Packed sequences: the model takes a mask of its own, and so does the PAL."""
    host = BY_NAME["llama"]
    plain_model = host.build()
    adapted = get_peft_model(host.build(), PALPeftConfig(hidden_size=12, num_heads=2)).eval()
    zoo.randomise(nn.ParameterList([p for n, p in adapted.named_parameters() if ".pal." in n]))
    ids = host.inputs(padding=False)["input_ids"]
    keep = table(9, 9, causal=True)
    keep[:, 4:, :4] = False
    keep = keep[:, None].expand(3, 1, 9, 9)
    mask = keep if form == "bool" else additive(keep, torch.float32, MIN)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])[None].expand(3, -1)
    parts = []
    with torch.no_grad():
        whole = adapted(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for part in (ids[:, :4], ids[:, 4:]):
            with zoo.by_hand(host, plain_model, adapted.get_base_model(), "pal", {"input_ids": part}, num_heads=2):
                parts.append(plain_model(input_ids=part).logits)
    assert zoo.difference(whole, torch.cat(parts, 1)) < 5e-5


def test_float_mask_of_the_user() -> None:
    """`torch.ones` is floating point unless told otherwise; DistilBERT (4.57) hands it to its blocks as it is."""
    for name in ("bert", "distilbert", "gpt2"):
        host = BY_NAME[name]
        adapted = get_peft_model(host.build(), PALPeftConfig(hidden_size=12, num_heads=2)).eval()
        zoo.randomise(nn.ParameterList([p for n, p in adapted.named_parameters() if ".pal." in n]))
        inputs = host.inputs()
        with torch.no_grad():
            a = zoo.outputs_of(adapted(**inputs))
            b = zoo.outputs_of(adapted(**{**inputs, "attention_mask": inputs["attention_mask"].float()}))
        for key, value in a.items():
            assert zoo.difference(b[key], value, host.real(inputs)) < 1e-5, name
