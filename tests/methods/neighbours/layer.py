"""A convolution over neighbouring tokens with a global term, plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.nn.bottleneck import Projections
from pal_adapters.nn.functional import linear, masked_mean
from pal_adapters.nn.unit import TaskUnit, UnitInputs, Weights


class Neighbours(TaskUnit):
    r"""A depthwise convolution of width 3 and a mean over all tokens between two projections, parallel to a block.

    $$t = V^E x, \qquad c_i = \sum_{k=-1}^{1} m_{i,i+k} \, w_k \odot t_{i+k} +
    v \odot \frac{\sum_j m_{ij} t_j}{\sum_j m_{ij}}, \qquad y = h_1 + o_2 + V^D g(c)$$

    with `m_ij = 1` where the model lets token `i` see token `j`, and 0 elsewhere: in a decoder no token sees the next
    one, and none sees padding.

    Args:
        width: `d`.
        hidden_size: `r`.
        dropout: dropout probability on `c`.
    """

    sites = ("residual",)
    needs = ("x", "mask")

    def __init__(self, width: int, hidden_size: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.projections = Projections(width, hidden_size)
        self.taps = nn.Parameter(torch.empty(4, hidden_size))  # w_-1, w_0, w_1 and v

    def signature(self) -> tuple[object, ...]:
        return (type(self), self.taps.shape, self.dropout)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        self.projections.reset_parameters(identity=identity, generator=generator)
        with torch.no_grad():
            if self.taps.device.type != "meta":
                self.taps.copy_(torch.empty(self.taps.shape).normal_(0.0, 0.5, generator=generator))

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        w = {name.removeprefix("projections."): weight for name, weight in weights.items()}
        tokens = linear(inputs.read("x"), w["encoder.weight"], w["encoder.bias"])
        n = tokens.shape[1]
        window, before = inputs.extend(tokens, last=1)  # one earlier token, [b, 1 + n, r]
        window = F.pad(window, (0, 0, 0, 1))
        taps = w["taps"] if w["taps"].dim() == 3 else w["taps"][None]  # one set, or one for each example
        seen = self._seen(inputs, n, before)
        mixed = taps[:, 3, None] * masked_mean(*inputs.visible_tokens(tokens, slot="mean"))
        for k in range(3):
            part = window[:, k : k + n] * taps[:, k, None]
            mixed = mixed + (part if seen is None else part * seen[:, :, k, None].to(part.dtype))
        mixed = F.gelu(F.dropout(mixed, self.dropout, self.training))
        return value + linear(mixed, w["decoder.weight"], w["decoder.bias"]).to(value.dtype)

    @staticmethod
    def _seen(inputs: UnitInputs, n: int, before: int | Tensor) -> Tensor | None:
        """`[b or 1, n, 3]`: whether each token of this call sees the one before it, itself and the next one."""
        visible = inputs.mask.visible(n, int(before) + n)
        if visible is None:
            return None
        visible = F.pad(visible, (1, 1))[..., -n - 2 :]  # the keys from just before this call to just after it
        return torch.stack([visible.diagonal(k, -2, -1) for k in range(3)], dim=-1)
