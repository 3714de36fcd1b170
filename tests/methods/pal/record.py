"""The record of PALs."""

from __future__ import annotations

from pal_adapters.methods.pal.config import PALOptions
from tests import plain
from tests.record import Record, Reference, Values


class PALReference(Reference):
    def term(self, w: plain.Weights, values: Values) -> plain.Tensor:
        x = values.raw if self.options["pal_input"] == "raw" else values.x
        return plain.pal(x, w, values.keep, heads=self.options["num_heads"])


RECORDS = [
    Record(
        options_class=PALOptions,
        reference=PALReference,
        options={"hidden_size": 12, "num_heads": 3},
        wider={"hidden_size": 18},
        variants=(
            {"lhuc": True}, {"activation_site": "middle"}, {"tie_projections": False}, {"use_bias": False},
            {"pal_input": "raw", "tie_projections": False}, {"num_heads": 2},
        ),
        changes={"num_heads": 2, "dropout": 0.25, "activation_site": "middle", "use_bias": False, "lhuc": True,
                 "tie_projections": False},
        # 2 d r + r + d + 3 L (r^2 + r)
        counts=(({"hidden_size": 204}, 1_819_836, 3_430_060), ({}, 1_819_836, 5_579_080)),
        attends=True,
        shares=True,
    )
]  # fmt: skip
