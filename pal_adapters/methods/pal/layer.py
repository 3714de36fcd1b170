"""Projected attention layers (PALs), plain torch.

Source: Stickland and Murray, "BERT and PALs", ICML 2019, and its code (AsaCooperStickland/Bert-n-Pals).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.nn.bottleneck import ActivationSite, Projections
from pal_adapters.nn.functional import linear, scale
from pal_adapters.nn.unit import TaskUnit, UnitInputs, Weights, init_linear, self_attention


class PAL(TaskUnit):
    r"""The PAL of one task in one block.

    $$TS(x) = g(V^D \, SA(V^E x)), \qquad y = LN_2(h_1 + o_2 + TS(x))$$

    `x` `[b, n, d]` is the block's input; `SA` is multi-head self-attention of width `r` with biases, scores divided by
    `sqrt(r / h)`, the model's own mask, dropout on the attention weights and no output projection; `g` is the exact
    GELU. Weights: `V^E [r, d]` and `V^D [d, r]` (shared across blocks if tied), and `[r, r]` each for query, key and
    value.

    Difference from the paper: the residual is `h_1`, as in the authors' code, so that `TS = 0` leaves the model
    unchanged. With `lhuc=True` the term is scaled, `TS := 2 sigmoid(rho) * TS` (the authors' `lhuc` with `mult`).

    Args:
        width: `d`.
        hidden_size: `r`; `num_heads` must divide it.
        num_heads: `h`, 6 in the authors' code.
        dropout: dropout probability on the attention weights.
        activation_site: where `g` is applied: after `V^D` (`"output"`), before it (`"middle"`) or nowhere (`"none"`).
        bias: whether the linear maps have biases.
        tied: whether `V^E` and `V^D` are shared and passed to `share`.
        lhuc: whether a learned vector `rho [d]` scales the term.
        reads: `"x"`, the block's input (normalised in pre-LN blocks), or `"raw"`, the unnormalised input.
    """

    groups_tasks = True
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
        reads: Literal["x", "raw"] = "x",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.activation_site = activation_site
        self.tied = tied
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
                self.query.bias is None, self.rho is None, self.tied)  # fmt: skip

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        for layer in (self.query, self.key, self.value):
            init_linear(layer, generator=generator)
        if not self.tied:
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
