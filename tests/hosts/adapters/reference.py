"""The forward pass of BERT in plain torch, with the host's bottlenecks and fusions.

Legend: b batch rows, n tokens, d width, r inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import plain
from tests.plain import Weights
from tests.plain import linear as linear
from tests.plain import low_rank as low_rank


def attention(x: Tensor, weights: Weights, heads: int, mask: Tensor, prefix: str = "") -> Tensor:
    """Self-attention without an output projection; `mask` `[b, n]` is 1 for tokens."""
    return plain.attention(x, weights, prefix, _keep(mask), heads)


def pal(x: Tensor, weights: Weights, heads: int, mask: Tensor) -> Tensor:
    """`g(V^D SA(V^E x))`."""
    return plain.pal(x, weights, _keep(mask), heads=heads)


def _keep(mask: Tensor) -> Tensor:
    return mask[:, None, None, :].bool()


def bottleneck(u: Tensor, adapter: nn.Module) -> Tensor:
    """The term that one of the host's bottlenecks adds for the input `u`."""
    down, up = adapter.adapter_down[0], adapter.adapter_up
    inner = adapter.non_linearity(u @ down.weight.T + down.bias)
    return adapter.scaling * (inner @ up.weight.T + up.bias)


def fusion(query: Tensor, terms: list[Tensor], layer: nn.Module) -> tuple[Tensor, Tensor]:
    """AdapterFusion: `V sum_i p_i t_i` `[b, n, d]` and `p` `[b, n, s]`, in evaluation mode."""
    stacked = torch.stack(terms, dim=2)
    scores = (layer.query(query)[:, :, None] * layer.key(stacked)).sum(-1)
    probabilities = scores.softmax(-1)
    return (probabilities[..., None] * layer.value(stacked)).sum(2), probabilities


class Block:
    """The values of one block, passed to functions that change them.

    Attributes:
        index: the block's index.
        x: its input.
        mask: `[b, n]`, 1 for tokens.
        h1: the residual stream after attention.
        norm: the norm behind the feed-forward part.
    """

    def __init__(self, index: int, x: Tensor, mask: Tensor) -> None:
        self.index, self.x, self.mask = index, x, mask
        self.h1 = x
        self.norm: Callable[[Tensor], Tensor] = lambda t: t

    def part(self, rows: slice | list[int] = slice(None), tokens: slice = slice(None)) -> Block:
        """The same block for some examples or tokens."""
        block = Block(self.index, self.x[rows, tokens], self.mask[rows, tokens])
        block.h1, block.norm = self.h1[rows, tokens], self.norm
        return block


Change = Callable[[Block, Tensor], Tensor]


def same(block: Block, value: Tensor) -> Tensor:
    return value


def bert(
    model: nn.Module, ids: Tensor, mask: Tensor, *, o1: Change = same, o2: Change = same, y: Change = same
) -> Tensor:
    """`last_hidden_state` of a post-LN `BertModel` whose `o1`, `o2` and `y` are changed in every block."""
    heads = model.config.num_attention_heads
    x = model.embeddings(input_ids=ids)
    for index, layer in enumerate(model.encoder.layer):
        block = Block(index, x, mask)
        own = {name: p.detach() for name, p in layer.attention.self.named_parameters()}
        out = o1(block, F.linear(attention(x, own, heads, mask), *_dense(layer.attention.output)))
        block.h1 = _norm(layer.attention.output)(x + out)
        block.norm = _norm(layer.output)
        inner = F.gelu(F.linear(block.h1, *_dense(layer.intermediate)))
        x = block.norm(block.h1 + o2(block, F.linear(inner, *_dense(layer.output))))
        x = y(block, x)
    return x


def _dense(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.dense.weight, module.dense.bias


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    norm = module.LayerNorm
    return lambda t: F.layer_norm(t, t.shape[-1:], norm.weight, norm.bias, norm.eps)


def weights_of(model: nn.Module, name: str, method: str) -> list[Weights]:
    """The weights of one adapter per block, as returned by the host; tied ones in every block."""
    adapter = model.get_adapter(name)
    shared: Weights = {}
    for key, value in adapter.get(-1, {}).get("shared", {}).items():
        owner, _, rest = key.partition("_stack0_")
        if owner == method:
            which, _, kind = rest.rpartition("_")
            shared[f"{which}.{kind}"] = value.detach()
    blocks = []
    for index in range(model.config.num_hidden_layers):
        own = dict(shared)
        module = adapter.get(index, {}).get("task_layer")
        if module is not None and method in module:
            own |= {key: value.detach() for key, value in module[method].named_parameters()}
            blocks.append(own)
        else:
            blocks.append({})
    return blocks
