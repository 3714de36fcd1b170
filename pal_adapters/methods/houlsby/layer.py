"""Houlsby bottlenecks and the variant of the PALs paper, plain torch.

Sources: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019 (google-research/adapter-bert);
Stickland and Murray, ICML 2019 (AsaCooperStickland/Bert-n-Pals, config key `houlsby`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.nn.bottleneck import Projections, project
from pal_adapters.nn.functional import linear
from pal_adapters.nn.unit import TaskUnit, UnitInputs, Weights, init_linear, self_attention

ACTIVATIONS = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class HoulsbyBottleneck(TaskUnit):
    r"""A Houlsby bottleneck: sequential, with its own residual.

    $$A(u) = u + W_2 \, g(W_1 u + b_1) + b_2$$

    `u` `[b, n, d]` is the output of a branch before the residual sum; `W_1 [m, d]`, `W_2 [d, m]`.

    Args:
        width: `d`.
        hidden_size: `m`.
        activation: `"gelu_new"` (the tanh approximation of the reference code) or another name in `ACTIVATIONS`.
        init_std: standard deviation of the truncated normal, 1e-2 in the paper (the reference code's default is 1e-3).
    """

    groups_tasks = True
    sites = ("value",)

    def __init__(self, width: int, hidden_size: int, *, activation: str = "gelu_new", init_std: float = 1e-2) -> None:
        super().__init__()
        self.activation = activation
        self.init_std = init_std
        self.down = nn.Linear(width, hidden_size)
        self.up = nn.Linear(hidden_size, width)

    def signature(self) -> tuple[object, ...]:
        return (type(self), self.down.weight.shape, self.activation)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """Weights from a normal truncated at two standard deviations, zero biases; `identity=True` zeroes `W_2`."""
        std = self.init_std
        with torch.no_grad():
            for layer in (self.down, self.up):
                layer.bias.zero_()
                if identity and layer is self.up:
                    layer.weight.zero_()
                elif layer.weight.device.type != "meta":
                    draw = nn.init.trunc_normal_(
                        torch.empty(layer.weight.shape), std=std, a=-2 * std, b=2 * std, generator=generator
                    )
                    layer.weight.copy_(draw)

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        inner = ACTIVATIONS[self.activation](linear(value, weights["down.weight"], weights["down.bias"]))
        return value + linear(inner, weights["up.weight"], weights["up.bias"]).to(value.dtype)


class ParallelHoulsby(TaskUnit):
    r"""The Houlsby variant of the PALs paper, for one task in one block.

    $$o_1' = o_1 + A(o_1), \qquad o_2' = o_2 + A'(h_1), \qquad A(u) = V^D g(V^E u)$$

    The second bottleneck reads the feed-forward *input*, so it is parallel to the feed-forward part. Both places in
    every block have their own weights; `g` is the exact GELU.

    Args:
        width: `d`.
        hidden_size: `r`.
    """

    groups_tasks = True
    sites = ("attention", "residual")
    needs = ("h",)

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.attention = Projections(width, hidden_size)
        self.ffn = Projections(width, hidden_size)

    def signature(self) -> tuple[object, ...]:
        return (type(self), self.attention.encoder.weight.shape)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        self.attention.reset_parameters(identity=identity, generator=generator)
        self.ffn.reset_parameters(identity=identity, generator=generator)

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        if site == "attention":
            return value + project(value, weights, "attention.").to(value.dtype)
        return value + project(inputs.read("h"), weights, "ffn.").to(value.dtype)


class _SmallAttention(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def reset_parameters(self, *, generator: torch.Generator | None) -> None:
        for layer in (self.query, self.key, self.value):
            init_linear(layer, generator=generator)


class HoulsbyPAL(TaskUnit):
    r"""A bottleneck after attention and a PAL parallel to the feed-forward part, for one task in one block.

    $$o_1' = o_1 + V^D g(V^E o_1), \qquad y = LN_2(h_1 + o_2 + PAL(h_1))$$

    Every block has its own bottleneck, of size `m`. The PAL of width `r` reads the feed-forward input `h_1`; its
    projections are shared across blocks.

    Args:
        width: `d`.
        hidden_size: `r`; `num_heads` must divide it.
        bottleneck_size: `m`, the authors' `extra_dim`.
        num_heads: attention heads of the PAL.
        dropout: dropout probability on the PAL's attention weights.
    """

    groups_tasks = True
    sites = ("attention", "residual")
    needs = ("h", "mask")

    def __init__(
        self, width: int, hidden_size: int, bottleneck_size: int, *, num_heads: int = 6, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.attention = Projections(width, bottleneck_size)
        self.num_heads = num_heads
        self.dropout = dropout
        self.pal = _SmallAttention(hidden_size)

    def signature(self) -> tuple[object, ...]:
        shapes = (self.attention.encoder.weight.shape, self.pal.query.weight.shape)
        return (type(self), *shapes, self.num_heads, self.dropout)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        self.attention.reset_parameters(identity=identity, generator=generator)
        self.pal.reset_parameters(generator=generator)

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        if site == "attention":
            return value + project(value, weights, "attention.").to(value.dtype)
        encoded = linear(inputs.read("h"), weights["encoder.weight"], weights["encoder.bias"])
        dropout = self.dropout if self.training else 0.0
        mixed = self_attention(encoded, weights, "pal.", num_heads=self.num_heads, dropout=dropout, inputs=inputs)
        return value + F.gelu(linear(mixed, weights["decoder.weight"], weights["decoder.bias"])).to(value.dtype)
