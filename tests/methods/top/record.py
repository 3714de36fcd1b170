"""The records of the modules on top of the last block."""

from __future__ import annotations

from pal_adapters.methods.top.config import TopAttentionOptions, TopBertLayerOptions
from tests import plain
from tests.record import Record, Reference


class TopAttentionReference(Reference):
    def top(self, w: plain.Weights, y: plain.Tensor, keep: plain.Tensor) -> plain.Tensor:
        layers, heads = self.options["num_layers"], self.options["num_heads"]
        return plain.top_attention(y, w, keep, layers=layers, heads=heads)


class TopBertLayerReference(Reference):
    def top(self, w: plain.Weights, y: plain.Tensor, keep: plain.Tensor) -> plain.Tensor:
        return plain.top_bert_layer(y, w, keep, heads=self.options["num_heads"])


RECORDS = [
    Record(
        options_class=TopAttentionOptions,
        reference=TopAttentionReference,
        options={"hidden_size": 12, "num_heads": 3, "num_layers": 2},
        wider={"hidden_size": 18},
        variants=({"num_layers": 1}, {"num_heads": 2}),
        changes={"num_layers": 3, "dropout": 0.0, "legacy_ln_init": True},
        counts=(({}, 1_320_444, 1_425_148),),  # 2 d r + r + d + 6 (4 (r^2 + r) + 2 r)
        parts=lambda depth: 1,
        at_top=True,
        attends=True,
    ),
    Record(
        options_class=TopBertLayerOptions,
        reference=TopBertLayerReference,
        options={"num_heads": 3, "intermediate_size": 16},
        wider={"intermediate_size": 20},
        variants=({"num_heads": 2},),
        changes={"dropout": 0.0, "legacy_ln_init": True},
        counts=(({}, 7_087_872, 12_596_224),),
        parts=lambda depth: 1,
        at_top=True,
        attends=True,
    ),
]
