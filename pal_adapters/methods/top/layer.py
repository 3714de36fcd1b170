"""Task modules on top of the last block, plain torch.

Source: Stickland and Murray, ICML 2019, and its code (AsaCooperStickland/Bert-n-Pals, config keys `top` and
`bert_lay_top`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.methods.released import draw_layer_norm
from pal_adapters.nn.functional import layer_norm, linear
from pal_adapters.nn.unit import TaskUnit, UnitInputs, Weights, init_linear, self_attention


def _init_norm(norm: nn.LayerNorm, *, legacy: bool, generator: torch.Generator | None) -> None:
    if legacy:
        draw_layer_norm(norm, generator)
    else:
        norm.reset_parameters()


class _Attention(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def reset_parameters(self, *, legacy_ln_init: bool, generator: torch.Generator | None) -> None:
        for layer in (self.query, self.key, self.value, self.dense):
            init_linear(layer, generator=generator)
        _init_norm(self.LayerNorm, legacy=legacy_ln_init, generator=generator)


class TopUnit(TaskUnit):
    """Base of both modules.

    Difference from the released code: layer norms start at 1 and 0 unless `legacy_ln_init=True`.

    Args:
        num_heads: attention heads.
        dropout: dropout probability on the attention weights and on the output of each part.
        eps: epsilon of the layer norms.
        legacy_ln_init: see `pal_adapters.methods.released`.
    """

    groups_tasks = True
    sites = ("stack_output",)
    needs = ("mask",)

    def __init__(
        self, *, num_heads: int = 12, dropout: float = 0.1, eps: float = 1e-12, legacy_ln_init: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.eps = eps
        self.legacy_ln_init = legacy_ln_init

    def attend(self, u: Tensor, inputs: UnitInputs, weights: Weights, prefix: str, slot: object = "") -> Tensor:
        """`LN(u + Drop(W SA(u)))` of `u` `[b, n, r]`, with the weights of an `_Attention` under `prefix`."""
        w, dropout = prefix, self.dropout if self.training else 0.0
        mixed = self_attention(u, weights, w, num_heads=self.num_heads, dropout=dropout, inputs=inputs, slot=slot)
        mixed = F.dropout(linear(mixed, weights[w + "dense.weight"], weights[w + "dense.bias"]), dropout)
        total = u.to(mixed.dtype) + mixed
        return layer_norm(total, weights[w + "LayerNorm.weight"], weights[w + "LayerNorm.bias"], self.eps)


class TopAttention(TopUnit):
    r"""Narrow attention on top of the last block, for one task.

    $$u_0 = E y_L, \qquad u_{i+1} = LN(u_i + Drop(W \, SA(u_i))), \qquad y_L := D u_k$$

    `y_L` `[b, n, d]` is the output of the stack (after the final norm of a pre-LN model), `E [r, d]`, `D [d, r]`. The
    `k` attention layers of width `r` are post-LN and have no feed-forward part; there is no residual from `y_L` and no
    activation. Because the module replaces `y_L`, it has no identity initialisation.

    Args:
        width: `d`.
        hidden_size: `r`; `num_heads` must divide it.
        num_layers: `k`, 6 in the released code.
        options: see `TopUnit`.
    """

    def __init__(self, width: int, hidden_size: int, *, num_layers: int = 6, **options: Any) -> None:
        super().__init__(**options)
        self.encoder = nn.Linear(width, hidden_size)
        self.decoder = nn.Linear(hidden_size, width)
        self.layers = nn.ModuleList(_Attention(hidden_size, self.eps) for _ in range(num_layers))

    def signature(self) -> tuple[object, ...]:
        return (type(self), self.encoder.weight.shape, len(self.layers), self.num_heads, self.dropout, self.eps)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        init_linear(self.encoder, generator=generator)
        init_linear(self.decoder, generator=generator)
        for layer in self.layers:
            assert isinstance(layer, _Attention)
            layer.reset_parameters(legacy_ln_init=self.legacy_ln_init, generator=generator)

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        u = linear(value, weights["encoder.weight"], weights["encoder.bias"])
        for i in range(len(self.layers)):
            u = self.attend(u, inputs, weights, f"layers.{i}.", slot=i)
        return linear(u, weights["decoder.weight"], weights["decoder.bias"]).to(value.dtype)


class TopBertLayer(TopUnit):
    r"""A whole BERT layer on top of the last block, for one task.

    $$h = LN(y_L + Drop(W \, SA(y_L))), \qquad y_L := LN(h + Drop(W_2 g(W_1 h)))$$

    Args:
        width: `d`; `num_heads` must divide it.
        intermediate_size: width of the feed-forward part.
        options: see `TopUnit`.
    """

    def __init__(self, width: int, intermediate_size: int, **options: Any) -> None:
        super().__init__(**options)
        self.attention = _Attention(width, self.eps)
        self.intermediate = nn.Linear(width, intermediate_size)
        self.dense = nn.Linear(intermediate_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=self.eps)

    def signature(self) -> tuple[object, ...]:
        return (type(self), self.intermediate.weight.shape, self.num_heads, self.dropout, self.eps)

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        self.attention.reset_parameters(legacy_ln_init=self.legacy_ln_init, generator=generator)
        init_linear(self.intermediate, generator=generator)
        init_linear(self.dense, generator=generator)
        _init_norm(self.LayerNorm, legacy=self.legacy_ln_init, generator=generator)

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        h = self.attend(value, inputs, weights, "attention.")
        inner = F.gelu(linear(h, weights["intermediate.weight"], weights["intermediate.bias"]))
        outer = F.dropout(linear(inner, weights["dense.weight"], weights["dense.bias"]), dropout)
        return layer_norm(h + outer, weights["LayerNorm.weight"], weights["LayerNorm.bias"], self.eps).to(value.dtype)
