"""Positions of tokens, from what a self-attention sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pal_adapters.blocks import signatures
from pal_adapters.blocks.sites import find_blocks
from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.masks import CallMask
from pal_adapters.hooks.positions import CountedPositions, token_positions
from tests.zoo import BY_NAME

CPU = torch.device("cpu")


def mask_of(sequences: list[list[int]], *, causal: bool, window: int | None) -> Tensor:
    """`[b, 1, n, n]` for rows that list the sequence of each token, 0 for padding."""
    number = torch.tensor(sequences)
    keep = (number[:, :, None] == number[:, None]) & (number[:, None] > 0)
    gap = torch.arange(number.shape[1])[:, None] - torch.arange(number.shape[1])
    if causal:
        keep &= gap >= 0
    if window is not None:
        keep &= gap.abs() < window
    return keep[:, None]


ROWS = [
    [1, 1, 1, 1, 1, 1, 1],  # no padding
    [0, 0, 0, 1, 1, 1, 1],  # on the left
    [1, 1, 1, 1, 1, 0, 0],  # on the right
    [1, 1, 1, 2, 2, 3, 3],  # three texts in a row
    [0, 1, 1, 2, 2, 2, 0],
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 3])
@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("unattended", [True, False])
def test_every_kind_of_row(causal: bool, window: int | None, additive: bool, unattended: bool) -> None:
    keep = mask_of(ROWS, causal=causal, window=window)
    if unattended:  # as some hosts do it: what sees nothing sees everything
        keep = keep | ~keep.any(-1, keepdim=True)
    mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min) if additive else keep
    queries, keys = token_positions(CallMask(mask, None, causal, CPU), queries=7, total=7)
    assert torch.equal(queries, keys)
    for row, sequences in enumerate(ROWS):
        for slot, number in enumerate(sequences):
            if number and not (unattended and not any(sequences[-1:])):
                assert keys[row, slot] == slot - sequences.index(number)


def test_padding_on_the_right_counts_on() -> None:
    mask = mask_of([ROWS[2]], causal=False, window=None)
    assert token_positions(CallMask(mask, None, False, CPU), queries=7, total=7)[1].tolist() == [list(range(7))]


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5)])
def test_without_padding(mask: Tensor | None) -> None:
    queries, keys = token_positions(CallMask(mask, None, True, CPU), queries=2, total=5)
    assert queries[0].tolist() == [3, 4]
    assert keys[0].tolist() == [0, 1, 2, 3, 4]


def test_with_a_cache() -> None:
    whole = mask_of(ROWS[:3], causal=True, window=None)
    mask = CallMask(torch.nn.functional.pad(whole[:2, :, -1:], (0, 3)), None, True, CPU)  # a static cache with room
    queries, keys = token_positions(mask, queries=1, total=7)
    assert queries.tolist() == [[6], [3]]
    assert keys[1, 3:].tolist() == [0, 1, 2, 3]
    # The text behind right padding goes on where it stopped.
    hole = torch.tensor([[1, 1, 1, 0, 0, 1]], dtype=torch.bool)[:, None, None]
    queries, keys = token_positions(CallMask(hole, None, True, CPU), queries=1, total=6)
    assert queries.tolist() == [[3]]
    assert keys[0, [0, 1, 2, 5]].tolist() == [0, 1, 2, 3]


def test_a_window_with_a_cache_needs_the_positions_of_the_host() -> None:
    mask = CallMask(torch.ones(2, 1, 1, 3, dtype=torch.bool), None, True, CPU, window=3)
    queries, keys = token_positions(mask, queries=1, total=7, ids=torch.tensor([[6], [4]]))
    assert queries.tolist() == [[6], [4]]
    assert keys.tolist() == [[4, 5, 6], [2, 3, 4]]
    with pytest.raises(UnsupportedError, match="pass position_ids, or use_cache=False"):
        token_positions(mask, queries=1, total=7)


@pytest.mark.parametrize(
    ("given", "expected"),
    [([2, 3], [0, 1]), ([0, 1], [0, 1]), (None, [0, 1])],
    ids=["counting padding", "without padding", "not given"],
)
def test_given_positions_do_not_count_padding(given: list[int] | None, expected: list[int]) -> None:
    """A wrapper may count the padding in the positions that it passes to the model of its text."""
    model = BY_NAME["mistral"].build().model
    counted = CountedPositions(model, find_blocks(model)[0])
    ids = None if given is None else torch.tensor([given])
    mask = torch.tensor([[0, 0, 1, 1]])
    call = {"attention_mask": mask, "position_ids": ids}
    counted._on_call(model, (), call, arguments=signatures.positions_of(model))
    # Inside, a model of several parts passes on a mapping of masks.
    counted._on_call(model, (), {"attention_mask": {}}, arguments=signatures.positions_of(model))
    found = counted.of_call(torch.tensor([[2, 3]]) if ids is None else ids, 2, 4)
    assert found is not None
    assert found.tolist() == [expected]
    counted.remove()
