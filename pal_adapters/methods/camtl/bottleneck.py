"""The conditional bottleneck. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pal_adapters.nn.functional import linear
from pal_adapters.nn.unit import init_linear

from .film import Condition, FiLM


class ConditionalBottleneck(nn.Module):
    r"""A low-rank map with an input modulated by the task.

    $$CB(z', X) = U(D(\mathrm{FiLM}(E z' + e, X)))$$

    with biases in all three linear maps, without a non-linearity or residual.

    Source: Pilault et al., ICLR 2021.

    Args:
        size: `d`.
        hidden_size: number of rows of `D`; None for `floor(d / 3)`.
    """

    def __init__(self, size: int, hidden_size: int | None = None) -> None:
        super().__init__()
        hidden_size = size // 3 if hidden_size is None else hidden_size
        self.embedding = nn.Linear(size, size)
        self.film = FiLM(size, size)
        self.down = nn.Linear(size, hidden_size)
        self.up = nn.Linear(hidden_size, size)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """`N(0, 0.02^2)` and zero biases; with `identity` FiLM starts as the identity, but not the bottleneck."""
        for layer in (self.embedding, self.down, self.up):
            init_linear(layer, generator=generator)
        self.film.reset_parameters(identity=identity, generator=generator)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """`[b, n, d]` -> `[b, n, d]`, in the dtype of `x`."""
        inner = condition._replace(table=self.embedding(condition.table))
        y = self.film(x, inner)
        y = linear(y, self.down.weight, self.down.bias)
        return linear(y, self.up.weight, self.up.bias).to(x.dtype)


def side_stream(bottlenecks: list[ConditionalBottleneck], outputs: list[Tensor], condition: Condition) -> Tensor:
    """`f_l = CB_l(z', y_l + f_(l-1))` with `f_0 = 0`, over the outputs `y_l` of all blocks; returns the last one."""
    value: Tensor | None = None
    for bottleneck, output in zip(bottlenecks, outputs, strict=True):
        value = bottleneck(output if value is None else output + value, condition)
    assert value is not None
    return value
