"""Learning hidden unit contributions (LHUC), plain torch.

Source: Swietojanski and Renals, 2014, as used by Stickland and Murray, ICML 2019 (AsaCooperStickland/Bert-n-Pals).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pal_adapters.nn.functional import scale
from pal_adapters.nn.unit import TaskUnit, UnitInputs, Weights


class LHUC(TaskUnit):
    r"""One scale per channel, for one task in one block.

    $$r = 2 \, \mathrm{sigmoid}(\rho), \qquad y := r \odot y$$

    `rho [d]` starts at 0, where `r = 1`. Pre-LN blocks scale the feed-forward output `o_2` instead of `y`: scales on
    the residual stream would accumulate from block to block.

    Args:
        width: `d`.
        site: what is scaled, `"output"` (`y`) or `"ffn"` (`o_2`).
    """

    groups_tasks = True

    def __init__(self, width: int, *, site: Literal["output", "ffn"] = "output") -> None:
        super().__init__()
        self.site = site
        self.rho = nn.Parameter(torch.zeros(width))

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.site,)

    def signature(self) -> tuple[object, ...]:
        return (type(self), self.site, self.rho.shape)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """`rho = 0`, or `N(0, 0.02^2)` without `identity`."""
        with torch.no_grad():
            if identity:
                self.rho.zero_()
            elif self.rho.device.type == "meta":
                self.rho.normal_(0.0, 0.02)
            else:
                self.rho.copy_(torch.empty(self.rho.shape).normal_(0.0, 0.02, generator=generator))

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        return scale(value, 2 * torch.sigmoid(weights["rho"]))
