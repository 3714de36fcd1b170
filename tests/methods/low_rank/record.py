"""The record of low-rank layers."""

from __future__ import annotations

from pal_adapters.methods.low_rank.config import LowRankOptions
from tests import plain
from tests.record import Record, Reference, Values


class LowRankReference(Reference):
    def term(self, w: plain.Weights, values: Values) -> plain.Tensor:
        return plain.low_rank(values.raw if self.options["pal_input"] == "raw" else values.x, w)


RECORDS = [
    Record(
        options_class=LowRankOptions,
        reference=LowRankReference,
        options={"hidden_size": 6},
        wider={"hidden_size": 9},
        variants=({"lhuc": True}, {"use_bias": False}, {"pal_input": "raw"}, {"activation_site": "output"}),
        changes={"hidden_size": 7, "activation_site": "none", "use_bias": False, "lhuc": True},
        counts=(({}, 1_853_616, 4_942_176),),  # L (2 d r + r + d)
    )
]
