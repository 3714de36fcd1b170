"""Divides the pieces of requests into batches of similar length over all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .encoding import Piece
from .served import ServedTasks

PASS_TOKENS = {"cpu": 64}
"""How many tokens take as long as a forward pass takes beside its own, by kind of device.

Measured on two cores with MiniLM and PALs (11 ms for a pass of 8 tokens, 0.16 ms for each further token) and rounded.
A larger model has a similar ratio, because both grow with its layers. Elsewhere a pass counts as a full batch, since
an accelerator is not busy with a small one.
"""


def batches(pieces: Sequence[Piece], tasks: ServedTasks, limit: int, device: str) -> Iterator[list[int]]:
    """The indices of the pieces of each batch, longest first: only those that may be mixed, up to `limit` tokens.

    A longer piece is a batch of its own.

    Args:
        pieces: The pieces.
        tasks: Their tasks.
        limit: Largest number of tokens in a batch, with padding.
        device: Kind of the model's device, such as `cpu` or `cuda`.
    """
    groups: dict[Any, list[int]] = {}
    for number, piece in enumerate(pieces):
        served = tasks[piece.request.task]
        key = served.group
        if served.task.kind == "language_modeling" and tasks.collator.left:
            key = (key, piece.length)  # padding on the left would shift absolute positions
        groups.setdefault(key, []).append(number)
    for group in groups.values():
        ordered = sorted(group, key=lambda number: -pieces[number].length)
        lengths = [pieces[number].length for number in ordered]
        rows = [len(pieces[number].inputs) for number in ordered]
        start = 0
        for end in best_ends(lengths, rows, limit, PASS_TOKENS.get(device, limit)):
            yield ordered[start:end]
            start = end


def best_ends(lengths: Sequence[int], rows: Sequence[int], limit: int, pass_tokens: int) -> list[int]:
    """Where to divide pieces that are sorted by length, such that padded tokens and passes cost least.

    A batch costs its rows times its longest piece, plus `pass_tokens`. The best division of all pieces from one on
    is its first batch and the best division of the rest, which is computed from the last piece to the first.

    Args:
        lengths: Tokens of each piece, in descending order.
        rows: Rows of each piece.
        limit: Largest number of tokens in a batch of several pieces, with padding.
        pass_tokens: Cost of a batch in addition to its tokens.

    Returns:
        The end of each batch, as an index into `lengths`.
    """
    count = len(lengths)
    before = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    cost = np.zeros(count + 1, dtype=np.int64)  # of the pieces from each index on
    best = [0] * count
    for start in reversed(range(count)):
        longest = max(lengths[start], 1)
        last = int(np.searchsorted(before, before[start] + limit // longest, side="right")) - 1
        last = max(last, start + 1)
        costs = (before[start + 1 : last + 1] - before[start]) * longest + cost[start + 1 : last + 1]
        chosen = int(costs.argmin())
        best[start] = start + 1 + chosen
        cost[start] = costs[chosen] + pass_tokens
    ends = []
    end = 0
    while end < count:
        end = best[end]
        ends.append(end)
    return ends
