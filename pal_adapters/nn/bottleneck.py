"""Bottlenecks in plain torch: two projections with a non-linearity, and several bottlenecks as one wide bottleneck.

Legend: b batch size, n tokens, d model width, r inner width, S sources, r_s width of source s, R their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import linear
from .unit import Weights, init_linear

ActivationSite = Literal["output", "middle", "none"]


class Projections(nn.Module):
    """`V^E: d -> r` and `V^D: r -> d`.

    Args:
        width: `d`.
        hidden_size: `r`.
        bias: whether both have a bias.
    """

    def __init__(self, width: int, hidden_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, hidden_size, bias=bias)
        self.decoder = nn.Linear(hidden_size, width, bias=bias)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """`N(0, 0.02^2)` and zero biases; `identity=True` zeroes `V^D`, so that the pair adds nothing."""
        init_linear(self.encoder, generator=generator)
        init_linear(self.decoder, zero=identity, generator=generator)


def project(x: Tensor, weights: Weights, prefix: str = "", activation_site: ActivationSite = "middle") -> Tensor:
    """`V^D g(V^E x)` of `x` `[b, n, d]` with the exact GELU.

    Args:
        x: `[b, n, d]`.
        weights: contains the weights of `Projections` under `prefix`, one set for all or one per example.
        prefix: prefix of the weights' names, such as `"attention."`.
        activation_site: where `g` is applied: between the projections, after both, or nowhere.

    Returns:
        `[b, n, d]`.
    """
    inner = linear(x, weights[f"{prefix}encoder.weight"], weights.get(f"{prefix}encoder.bias"))
    if activation_site == "middle":
        inner = F.gelu(inner)
    outer = linear(inner, weights[f"{prefix}decoder.weight"], weights.get(f"{prefix}decoder.bias"))
    return F.gelu(outer) if activation_site == "output" else outer


class Bottleneck(NamedTuple):
    r"""The weights of $W_u f(W_d x + b_d) + b_u$.

    Attributes:
        down: `W_d` `[r, d]`.
        down_bias: `b_d` `[r]`.
        up: `W_u` `[d, r]`.
        up_bias: `b_u` `[d]`.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    def __call__(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`[..., d]` for `x` `[..., d]` and the non-linearity `f`."""
        return F.linear(function(F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)


def widen(sources: Sequence[Bottleneck], coefficients: Tensor) -> Bottleneck:
    r"""One bottleneck of width `R` that gives $\sum_s \omega_s \odot a_s(x)$.

    $$W_d = [W_{d,1}; \dots; W_{d,S}], \quad W_u = [\mathrm{diag}(\omega_1) W_{u,1}, \dots], \quad
    b_u = \sum_s \omega_s \odot b_{u,s}$$

    Exact for every element-wise `f` that the sources share; differentiable in everything.

    Args:
        sources: the sources' weights.
        coefficients: `omega`, `[S, d]` or `[S, 1]`.
    """
    up = torch.cat([source.up for source in sources], 1)
    coefficients = coefficients.to(up)
    width = up.shape[0]
    per_channel = coefficients.expand(-1, width)
    if len({source.up.shape[1] for source in sources}) == 1:
        up = (up.view(width, len(sources), -1) * per_channel.t().unsqueeze(-1)).view_as(up)
    else:
        spread = [c[:, None].expand(-1, s.up.shape[1]) for c, s in zip(per_channel, sources, strict=True)]
        up = up * torch.cat(spread, 1)
    return Bottleneck(
        torch.cat([source.down for source in sources]),
        torch.cat([source.down_bias for source in sources]),
        up,
        (per_channel * torch.stack([source.up_bias for source in sources])).sum(0),
    )
