"""Projected attention layers (PALs), plain torch.

Source: Stickland and Murray, "BERT and PALs", ICML 2019, and its code (AsaCooperStickland/Bert-n-Pals).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.nn.functional import linear, scale
from pal_adapters.nn.unit import TaskUnit, UnitInputs, Weights, init_linear, self_attention

ActivationSite = Literal["output", "middle", "none"]


class Projections(nn.Module):
    """`V^E: d -> r` and `V^D: r -> d` of one task, shared by the blocks of a stack.

    Args:
        width: `d`.
        hidden_size: `r`.
        bias: whether both carry a bias.
    """

    def __init__(self, width: int, hidden_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, hidden_size, bias=bias)
        self.decoder = nn.Linear(hidden_size, width, bias=bias)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """`N(0, 0.02^2)`; `identity=True` zeroes `V^D`, and `gelu(0) = 0` has slope 1/2, so gradients flow."""
        init_linear(self.encoder, generator=generator)
        init_linear(self.decoder, zero=identity, generator=generator)


class PAL(TaskUnit):
    r"""The PAL of one task in one block.

    $$TS(x) = g(V^D \, SA(V^E x)), \qquad y = LN_2(h_1 + o_2 + TS(x))$$

    `x` `[b, n, d]` is the block's input, `SA` multi-head self-attention of width `r` with biases, scores over
    `sqrt(r / h)`, the host's mask, dropout on the probabilities and no output projection; `g` is the exact GELU.
    Weights: `V^E [r, d]`, `V^D [d, r]` (shared over the blocks unless untied), query, key and value `[r, r]` each.

    Differs from the paper in: the residual is `h1`, as in the authors' code, so that `TS = 0` is the host itself.
    With `lhuc=True` the term is scaled, `TS := 2 sigmoid(rho) * TS` (the authors' `lhuc` with `mult`).

    Args:
        width: `d`.
        hidden_size: `r`; `num_heads` must divide it.
        num_heads: `h`, 6 in the authors' code.
        dropout: on the attention probabilities.
        activation_site: `"output"` (after `V^D`), `"middle"` (before it) or `"none"`.
        bias: biases in every linear.
        tied: whether `V^E`, `V^D` come from elsewhere, by `share`.
        lhuc: whether a vector `rho [d]` scales the term.
        reads: `"x"`, the block's input (pre-LN: normalised), `"raw"`, that input as it is, or `"h"`, the feed-forward
            input.
    """

    sites = ("residual",)

    def __init__(
        self,
        width: int,
        hidden_size: int,
        *,
        num_heads: int = 6,
        dropout: float = 0.1,
        activation_site: ActivationSite = "output",
        bias: bool = True,
        tied: bool = True,
        lhuc: bool = False,
        reads: Literal["x", "raw", "h"] = "x",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.activation_site = activation_site
        self.reads = reads
        self.query = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=bias)
        if not tied:
            projections = Projections(width, hidden_size, bias=bias)
            self.encoder, self.decoder = projections.encoder, projections.decoder
        self.rho = nn.Parameter(torch.zeros(width)) if lhuc else None

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.reads, "mask")

    def signature(self) -> tuple[object, ...]:
        return (type(self), self.query.weight.shape, self.num_heads, self.dropout, self.activation_site, self.reads,
                self.query.bias is None, self.rho is None, hasattr(self, "encoder"))  # fmt: skip

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        for layer in (self.query, self.key, self.value):
            init_linear(layer, generator=generator)
        if hasattr(self, "encoder"):
            init_linear(self.encoder, generator=generator)
            init_linear(self.decoder, zero=identity, generator=generator)
        if self.rho is not None:
            nn.init.zeros_(self.rho)

    def term(self, x: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        """`TS(x)`, `[b, n, d]`."""
        encoded = linear(x, weights["encoder.weight"], weights.get("encoder.bias"))
        dropout = self.dropout if self.training else 0.0
        mixed = self_attention(encoded, weights, "", num_heads=self.num_heads, dropout=dropout, inputs=inputs)
        if self.activation_site == "middle":
            mixed = F.gelu(mixed)
        term = linear(mixed, weights["decoder.weight"], weights.get("decoder.bias"))
        if self.activation_site == "output":
            term = F.gelu(term)
        if "rho" in weights:
            term = scale(term, 2 * torch.sigmoid(weights["rho"]))
        return term

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        return value + self.term(inputs.read(self.reads), inputs, weights).to(value.dtype)


def added_parameters(width: int, hidden_size: int, depth: int) -> int:
    """Parameters that one task's PALs add, `2 d r + r + d + 3 L (r^2 + r)`."""
    d, r = width, hidden_size
    return 2 * d * r + r + d + 3 * depth * (r * r + r)


def default_hidden_size(width: int, depth: int, base_parameters: int, num_heads: int = 6) -> int:
    """The PAL width for `hidden_size=None`.

    204 for `d = 768` (the authors') and 264 for `d = 1024`; elsewhere the smallest multiple of `num_heads` with which
    eight tasks make the model at least 1.13 times as large, the paper's budget.

    Args:
        base_parameters: parameters of the pretrained model.
    """
    fixed = {768: 204, 1024: 264}.get(width)
    if fixed is not None and fixed % num_heads == 0:
        return fixed
    hidden_size = num_heads
    while 8 * added_parameters(width, hidden_size, depth) < math.ceil(0.13 * base_parameters):
        hidden_size += num_heads
    return hidden_size
