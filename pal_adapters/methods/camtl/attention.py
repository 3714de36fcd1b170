"""The conditional block-diagonal term in the attention scores. Plain torch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pal_adapters.errors import UnsupportedError

from .film import Condition, FiLM


def block_layout(size: int, max_length: int) -> tuple[int, int]:
    """How many diagonal blocks the term has, and how many columns each.

    `N = max(1, d // n_max)` and `c = ceil(n_max / N)`. If `n_max` divides `d`, this is the layout of the released
    code, which rejects other lengths. As there, the last block takes the rest of `n_max`, so there may be fewer than
    `N` blocks.

    Args:
        size: `d`.
        max_length: `n_max`.

    Returns:
        The number of blocks, and `c`.
    """
    columns = math.ceil(max_length / max(1, size // max_length))
    return math.ceil(max_length / columns), columns


class ConditionalAttentionBias(nn.Module):
    r"""A block-diagonal matrix that is added to the attention scores of all heads.

    $$A' = (1 + \gamma(z')) \odot A + \beta(z'), \qquad M(z') = \mathrm{blockdiag}(\text{row chunks of } A')$$

    with `A` `[n_max, c]` and blocks of `c` rows (see `block_layout`). Outside the blocks `M` is zero, not minus
    infinity: tokens of different blocks still see each other. Rows and columns are indexed by a token's position in
    its sequence, so that padding on either side makes no difference.

    Source: Pilault et al., ICLR 2021. Differences from the released code: `max_length` need not divide the width,
    and shorter sequences use the leading part of `M`.

    Args:
        size: `d`.
        max_length: `n_max`.
        modulation: `"columns"`: `gamma` and `beta` have `c` numbers each, the same for every row (the released code).
            `"matrix"`: `c x c` numbers each, the same for every block (the paper's notation).
    """

    def __init__(self, size: int, max_length: int, *, modulation: Literal["columns", "matrix"] = "columns") -> None:
        super().__init__()
        self.max_length = max_length
        self.columns = block_layout(size, max_length)[1]
        self.modulation = modulation
        self.matrix = nn.Parameter(torch.empty(max_length, self.columns))
        self.film = FiLM(size, self.columns if modulation == "columns" else self.columns**2)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """`A = 0`; FiLM as in `FiLM`."""
        with torch.no_grad():
            self.matrix.zero_()
        self.film.reset_parameters(identity=identity, generator=generator)

    def forward(self, condition: Condition, queries: Tensor, keys: Tensor, total: int) -> Tensor:
        """The entries of `M` for queries and keys at these positions of their sequences.

        Args:
            condition: the condition of the batch.
            queries: `[b, q]`, the positions of the queries, or `[1, q]` if they are the same in all examples.
            keys: `[b, k]` or `[1, k]`, the positions of the keys.
            total: the number of tokens so far, including those outside a sliding window.

        Returns:
            `[b, q, k]`, or `[c, q, k]`, one matrix per condition, if all examples have the same positions.

        Raises:
            UnsupportedError: for more than `max_length` tokens.
        """
        if total > self.max_length:
            raise UnsupportedError(
                f"the sequence has {total} tokens, but max_length={self.max_length}: the conditional "
                "attention has no entries for more. Shorten the sequences, or create the adapter with a larger "
                "max_length."
            )
        width = self.columns
        gamma, beta = self.film.coefficients(condition.table)
        if queries.shape[0] > 1:
            gamma, beta = condition.rows(gamma), condition.rows(beta)
        if self.modulation == "matrix":
            gamma, beta = (_at(v.unflatten(-1, (width, width)), queries % width) for v in (gamma, beta))
        else:
            gamma, beta = gamma.unsqueeze(1), beta.unsqueeze(1)
        blocks = (1 + gamma) * self.matrix[queries] + beta  # [c or b, q, width]
        same = (queries // width)[:, :, None] == (keys // width)[:, None]
        # Column k of a row is entry k mod c of its row of A', where k lies in the row's own block.
        columns = (keys % width)[:, None].expand(blocks.shape[0], blocks.shape[1], -1)
        return blocks.gather(-1, columns) * same.to(blocks.dtype)


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """`[b or 1, n, k]` at `rows` `[b or 1, q]`: `[b or 1, q, k]`."""
    if rows.shape[0] == 1:
        return values.index_select(1, rows[0])
    return values.expand(rows.shape[0], -1, -1).gather(1, rows.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
