"""Every method in plain torch, on BERT (post-LN) and Llama (pre-LN), from the weights of a saved adapter.

Written from the equations, apart from the package: blocks are taken apart and put together again here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]
HEADS = 3


def under(weights: Weights, path: str) -> Weights:
    return {k[len(path) :]: v for k, v in weights.items() if k.startswith(path)}


def lin(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(w: Weights, x: Tensor, bias: Tensor) -> Tensor:
    """Multi-head self-attention without an output projection; `bias` `[b, 1, n, n]` is added to the scores."""

    def heads(name: str) -> Tensor:
        b, n, r = x.shape
        return lin(w, name, x).reshape(b, n, HEADS, r // HEADS).permute(0, 2, 1, 3)

    q, k, v = heads("query"), heads("key"), heads("value")
    probabilities = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias, dim=-1)
    return (probabilities @ v).permute(0, 2, 1, 3).reshape(x.shape)


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-12) * w[f"{name}.weight"] + w[f"{name}.bias"]


def bottleneck(w: Weights, x: Tensor) -> Tensor:
    return lin(w, "decoder", F.gelu(lin(w, "encoder", x)))


def houlsby(w: Weights, u: Tensor) -> Tensor:
    return u + lin(w, "up", F.gelu(lin(w, "down", u), approximate="tanh"))


class Method:
    """What one method does at each place of a block.

    Args:
        name: the method.
        weights: the adapter's, without the prefix of the model.
        stack: path of the list of blocks.
    """

    def __init__(self, name: str, weights: Weights, stack: str) -> None:
        self.name = name
        self.weights = weights
        self.stack = stack

    def at(self, index: int, *parts: str) -> Weights:
        return under(self.weights, ".".join([self.stack, str(index), *parts]) + ".")

    def unit(self, index: int) -> Weights:
        return self.at(index, self.name, f"{self.name}_units")

    def shared(self) -> Weights:
        return self.at(0, self.name, f"{self.name}_shared")

    def attention(self, index: int, o1: Tensor, path: str) -> Tensor:
        if self.name in ("parallel_houlsby", "houlsby_pal"):
            return o1 + bottleneck(under(self.unit(index), "attention."), o1)
        if self.name == "houlsby":
            return houlsby(self.at(index, path, "houlsby.houlsby_units"), o1)
        return o1

    def ffn(self, index: int, o2: Tensor, path: str) -> Tensor:
        if self.name == "houlsby":
            return houlsby(self.at(index, path, "houlsby.houlsby_units"), o2)
        if self.name == "lhuc" and self.stack.endswith("layers"):  # pre-LN: the branch, not the stream
            return o2 * 2 * torch.sigmoid(self.unit(index)["rho"])
        return o2

    def term(self, index: int, x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
        """What is added to the sum that ends the block; `x` is the block's (normalised) input, `h` the ffn's."""
        unit, shared = self.unit(index), self.shared()
        if self.name == "pal":
            return F.gelu(lin(shared, "decoder", attend(unit, lin(shared, "encoder", x), bias)))
        if self.name == "low_rank":
            return bottleneck(unit, x)
        if self.name == "parallel_houlsby":
            return bottleneck(under(unit, "ffn."), h)
        if self.name == "houlsby_pal":
            inner = attend(under(unit, "pal."), lin(shared, "encoder", h), bias)
            return F.gelu(lin(shared, "decoder", inner))
        return torch.zeros_like(x)

    def output(self, index: int, y: Tensor) -> Tensor:
        if self.name == "lhuc" and not self.stack.endswith("layers"):
            return y * 2 * torch.sigmoid(self.unit(index)["rho"])
        return y

    def top(self, last: int, y: Tensor, bias: Tensor) -> Tensor:
        if not self.name.startswith("top"):
            return y
        w = self.unit(last)
        if self.name == "top_attention":
            u = lin(w, "encoder", y)
            for i in range(2):
                layer = under(w, f"layers.{i}.")
                u = norm(layer, "LayerNorm", u + lin(layer, "dense", attend(layer, u, bias)))
            return lin(w, "decoder", u)
        attention = under(w, "attention.")
        h = norm(attention, "LayerNorm", y + lin(attention, "dense", attend(attention, y, bias)))
        return norm(w, "LayerNorm", h + lin(w, "dense", F.gelu(lin(w, "intermediate", h))))

    def swap_norms(self, model: nn.Module) -> None:
        """Houlsby: put the adapter's layer norms into a copy of the base model."""
        own = {k.replace(".houlsby_norms", ""): v for k, v in self.weights.items() if ".houlsby_norms." in k}
        _missing, unexpected = model.load_state_dict(own, strict=False)
        assert not unexpected, unexpected


def bert_logits(model: Any, name: str, weights: Weights, given: dict[str, Tensor]) -> Tensor:
    """The logits of a plain `BertForSequenceClassification` with an adapter; `model` is changed."""
    method = Method(name, weights, "bert.encoder.layer")
    method.swap_norms(model)
    core = model.bert
    mask = given["attention_mask"]
    bias = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    bias = bias.expand(-1, 1, mask.shape[1], -1)
    x = core.embeddings(given["input_ids"])
    layers = core.encoder.layer
    for i, layer in enumerate(layers):
        context = layer.attention.self(x, attention_mask=bias)[0]
        o1 = layer.attention.output.dropout(layer.attention.output.dense(context))
        h1 = layer.attention.output.LayerNorm(x + method.attention(i, o1, "attention.output.dropout"))
        o2 = layer.output.dropout(layer.output.dense(F.gelu(layer.intermediate.dense(h1))))
        o2 = method.ffn(i, o2, "output.dropout")
        y = layer.output.LayerNorm(h1 + o2 + method.term(i, x, h1, bias))
        x = method.output(i, y)
    x = method.top(len(layers) - 1, x, bias)
    pooled = torch.tanh(core.pooler.dense(x[:, 0]))
    return F.linear(model.dropout(pooled), weights["classifier.weight"], weights["classifier.bias"])


def llama_logits(model: Any, name: str, weights: Weights, given: dict[str, Tensor]) -> Tensor:
    """The logits of a plain `LlamaForCausalLM` with an adapter; `model` is changed."""
    method = Method(name, weights, "model.layers")
    method.swap_norms(model)
    core, ids, mask = model.model, given["input_ids"], given["attention_mask"]
    n = ids.shape[1]
    keep = torch.ones(n, n, dtype=torch.bool).tril()[None, None] & mask[:, None, None, :].bool()
    bias = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    x = core.embed_tokens(ids)
    rotary = core.rotary_emb(x, torch.arange(n)[None])
    for i, layer in enumerate(core.layers):
        n1 = layer.input_layernorm(x)
        o1 = layer.self_attn(hidden_states=n1, position_embeddings=rotary, attention_mask=bias)[0]
        h1 = x + method.attention(i, o1, "self_attn")
        n2 = layer.post_attention_layernorm(h1)
        x = h1 + method.ffn(i, layer.mlp(n2), "mlp") + method.term(i, n1, n2, bias)
    x = method.top(len(core.layers) - 1, core.norm(x), bias)
    return model.lm_head(x)
