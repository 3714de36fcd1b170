"""How the pieces of requests are divided into batches: compared with every possible division."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from pal_adapters.multitask.predict.batching import best_ends


def cost(ends: list[int], lengths: list[int], rows: list[int], pass_tokens: int) -> int:
    return sum(sum(rows[a:b]) * lengths[a] + pass_tokens for a, b in pairwise([0, *ends]))


def fits(ends: list[int], lengths: list[int], rows: list[int], limit: int) -> bool:
    return all(b - a == 1 or sum(rows[a:b]) * lengths[a] <= limit for a, b in pairwise([0, *ends]))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3)), min_size=1, max_size=9),
    st.integers(1, 200),
    st.integers(0, 100),
)
def test_no_division_costs_less(pieces: list[tuple[int, int]], limit: int, pass_tokens: int) -> None:
    pieces = sorted(pieces, reverse=True)
    lengths = [length for length, _ in pieces]
    rows = [some for _, some in pieces]
    all_divisions = (
        [*(index for index, cut in enumerate(cuts, start=1) if cut), len(pieces)]
        for cuts in product((False, True), repeat=len(pieces) - 1)
    )
    allowed = [ends for ends in all_divisions if fits(ends, lengths, rows, limit)]
    found = best_ends(lengths, rows, limit, pass_tokens)
    assert found in allowed
    assert cost(found, lengths, rows, pass_tokens) == min(cost(ends, lengths, rows, pass_tokens) for ends in allowed)


def test_an_expensive_pass_makes_one_batch() -> None:
    assert best_ends([60, 60, 10, 10], [1, 1, 1, 1], 1_000, 1_000) == [4]


def test_long_and_short_texts_are_kept_apart() -> None:
    assert best_ends([60, 60, 10, 10], [1, 1, 1, 1], 1_000, 64) == [2, 4]


def test_nothing_to_divide() -> None:
    assert best_ends([], [], 100, 64) == []
