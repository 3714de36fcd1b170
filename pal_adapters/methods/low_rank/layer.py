"""Low-rank layers, plain torch.

Source: Stickland and Murray, ICML 2019, and its code (AsaCooperStickland/Bert-n-Pals, `BERTLowRank`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pal_adapters.nn.bottleneck import ActivationSite, project
from pal_adapters.nn.functional import scale
from pal_adapters.nn.unit import TaskUnit, UnitInputs, Weights, init_linear


class LowRank(TaskUnit):
    r"""The low-rank layer of one task in one block.

    $$TS(x) = V^D g(V^E x), \qquad y = LN_2(h_1 + o_2 + TS(x))$$

    `x` `[b, n, d]` is the block's input; every block has its own `V^E [r, d]` and `V^D [d, r]`; `g` is the exact GELU.

    Args:
        width: `d`.
        hidden_size: `r`.
        activation_site: where `g` is applied: between the projections (`"middle"`), after `V^D` (`"output"`) or
            nowhere (`"none"`).
        bias: whether the projections have biases.
        lhuc: whether a learned vector `rho [d]` scales the term, `TS := 2 sigmoid(rho) * TS`.
        reads: `"x"`, the block's input (normalised in pre-LN blocks), or `"raw"`, the unnormalised input.
    """

    groups_tasks = True
    sites = ("residual",)

    def __init__(
        self,
        width: int,
        hidden_size: int,
        *,
        activation_site: ActivationSite = "middle",
        bias: bool = True,
        lhuc: bool = False,
        reads: Literal["x", "raw"] = "x",
    ) -> None:
        super().__init__()
        self.reads = reads
        self.activation_site = activation_site
        self.encoder = nn.Linear(width, hidden_size, bias=bias)
        self.decoder = nn.Linear(hidden_size, width, bias=bias)
        self.rho = nn.Parameter(torch.zeros(width)) if lhuc else None

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.reads,)

    def signature(self) -> tuple[object, ...]:
        return (type(self), self.encoder.weight.shape, self.activation_site, self.encoder.bias is None,
                self.rho is None, self.reads)  # fmt: skip

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        init_linear(self.encoder, generator=generator)
        init_linear(self.decoder, zero=identity, generator=generator)
        if self.rho is not None:
            nn.init.zeros_(self.rho)

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        term = project(inputs.read(self.reads), weights, activation_site=self.activation_site)
        if "rho" in weights:
            term = scale(term, 2 * torch.sigmoid(weights["rho"]))
        return value + term.to(value.dtype)
