"""BERT (post-LN) and Llama (pre-LN) with any method in plain torch, from the weights of a saved adapter.

Blocks are taken apart and put together again here; what a method does in them, its record says.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods import RECORDS
from tests.plain import Weights, under
from tests.record import Values

PATHS = {
    "bert": {"attention": "attention.output.dropout", "ffn": "output.dropout"},
    "llama": {"attention": "self_attn", "ffn": "mlp"},
}
"""Where the branches of a block end."""


class Adapter:
    """A saved adapter: the weights of each block and what its method does with them.

    Args:
        name: the method.
        weights: the adapter's, without the prefix of the model.
        stack: path of the list of blocks.
        paths: see `PATHS`.
    """

    def __init__(self, name: str, weights: Weights, stack: str, paths: dict[str, str]) -> None:
        self.name = name
        self.weights = weights
        self.stack = stack
        self.paths = paths
        self.reference = RECORDS[name].make_reference()

    def block(self, index: int) -> Weights:
        """The weights that act in a block, with what all blocks share, and a unit at a branch below its name."""
        start = f"{self.stack}.{index}."
        found = under(self.weights, f"{self.stack}.0.{self.name}.{self.name}_shared.")
        found |= under(self.weights, f"{start}{self.name}.{self.name}_units.")
        for place, path in self.paths.items():
            own = under(self.weights, f"{start}{path}.{self.name}.{self.name}_units.")
            found |= {f"{place}.{key}": value for key, value in own.items()}
        return found

    def swap_norms(self, model: nn.Module) -> None:
        """Houlsby: put the adapter's layer norms into a copy of the base model."""
        own = {k.replace(".houlsby_norms", ""): v for k, v in self.weights.items() if ".houlsby_norms." in k}
        _missing, unexpected = model.load_state_dict(own, strict=False)
        assert not unexpected, unexpected


def bert_logits(model: Any, name: str, weights: Weights, given: dict[str, Tensor]) -> Tensor:
    """The logits of a plain `BertForSequenceClassification` with an adapter; `model` is changed."""
    adapter = Adapter(name, weights, "bert.encoder.layer", PATHS["bert"])
    adapter.swap_norms(model)
    method = adapter.reference
    core = model.bert
    mask = given["attention_mask"]
    keep = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
    bias = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    x = core.embeddings(given["input_ids"])
    layers = core.encoder.layer
    for i, layer in enumerate(layers):
        w = adapter.block(i)
        context = layer.attention.self(x, attention_mask=bias)[0]
        o1 = layer.attention.output.dropout(layer.attention.output.dense(context))
        h1 = layer.attention.output.LayerNorm(x + method.attention(w, o1))
        o2 = layer.output.dropout(layer.output.dense(F.gelu(layer.intermediate.dense(h1))))
        values = Values(x, x, h1, keep, post=True)
        y = layer.output.LayerNorm(h1 + method.ffn(w, o2, values) + method.term(w, values))
        x = method.output(w, y, values)
    x = method.top(adapter.block(len(layers) - 1), x, keep)
    pooled = torch.tanh(core.pooler.dense(x[:, 0]))
    return F.linear(model.dropout(pooled), weights["classifier.weight"], weights["classifier.bias"])


def llama_logits(model: Any, name: str, weights: Weights, given: dict[str, Tensor]) -> Tensor:
    """The logits of a plain `LlamaForCausalLM` with an adapter; `model` is changed."""
    adapter = Adapter(name, weights, "model.layers", PATHS["llama"])
    adapter.swap_norms(model)
    method = adapter.reference
    core, ids, mask = model.model, given["input_ids"], given["attention_mask"]
    n = ids.shape[1]
    keep = torch.ones(n, n, dtype=torch.bool).tril()[None, None] & mask[:, None, None, :].bool()
    bias = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    x = core.embed_tokens(ids)
    rotary = core.rotary_emb(x, torch.arange(n)[None])
    for i, layer in enumerate(core.layers):
        w = adapter.block(i)
        n1 = layer.input_layernorm(x)
        o1 = layer.self_attn(hidden_states=n1, position_embeddings=rotary, attention_mask=bias)[0]
        h1 = x + method.attention(w, o1)
        n2 = layer.post_attention_layernorm(h1)
        values = Values(n1, x, n2, keep, post=False)
        x = method.output(w, h1 + method.ffn(w, layer.mlp(n2), values) + method.term(w, values), values)
    x = method.top(adapter.block(len(core.layers) - 1), core.norm(x), keep)
    return model.lm_head(x)
