"""The formulas of the methods in plain torch, written from the papers and apart from the package.

Legend: b batch size, n tokens, d width, r inner width. Weights are tensors by name; `keep` is `[b or 1, 1, n, n]`,
True where a query sees a key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def under(w: Weights, prefix: str) -> Weights:
    """The weights below a prefix."""
    return {name[len(prefix) :]: value for name, value in w.items() if name.startswith(prefix)}


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(x: Tensor, w: Weights, prefix: str, keep: Tensor, heads: int) -> Tensor:
    """Multi-head attention without an output projection, one head after the other."""
    q, k, v = (linear(x, w, prefix + part) for part in ("query", "key", "value"))
    size = q.shape[-1] // heads
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        # Not -inf: padding that sees nothing must not be NaN.
        scores = scores.masked_fill(~keep[:, 0], torch.finfo(scores.dtype).min)
        out.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(out, dim=-1)


def scaled(term: Tensor, w: Weights) -> Tensor:
    """LHUC, where there is a `rho`."""
    return 2 * torch.sigmoid(w["rho"]) * term if "rho" in w else term


def pal(x: Tensor, w: Weights, keep: Tensor, *, heads: int = 2, prefix: str = "") -> Tensor:
    """`g(V^D SA(V^E x))`."""
    return scaled(gelu(linear(attention(linear(x, w, "encoder"), w, prefix, keep, heads), w, "decoder")), w)


def low_rank(x: Tensor, w: Weights, prefix: str = "") -> Tensor:
    """`V^D g(V^E x)`."""
    return scaled(linear(gelu(linear(x, w, prefix + "encoder")), w, prefix + "decoder"), w)


def houlsby(u: Tensor, w: Weights) -> Tensor:
    """`u + W_2 g(W_1 u)` with the tanh approximation of the GELU."""
    inner = linear(u, w, "down")
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))
    return u + linear(0.5 * inner * (1 + tanh), w, "up")


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-12).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def top_attention(y: Tensor, w: Weights, keep: Tensor, *, layers: int, heads: int) -> Tensor:
    u = linear(y, w, "encoder")
    for i in range(layers):
        mixed = linear(attention(u, w, f"layers.{i}.", keep, heads), w, f"layers.{i}.dense")
        u = layer_norm(u + mixed, w, f"layers.{i}.LayerNorm")
    return linear(u, w, "decoder")


def top_bert_layer(y: Tensor, w: Weights, keep: Tensor, *, heads: int) -> Tensor:
    mixed = linear(attention(y, w, "attention.", keep, heads), w, "attention.dense")
    h = layer_norm(y + mixed, w, "attention.LayerNorm")
    return layer_norm(h + linear(gelu(linear(h, w, "intermediate")), w, "dense"), w, "LayerNorm")
