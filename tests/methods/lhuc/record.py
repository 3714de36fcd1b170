"""The record of LHUC."""

from __future__ import annotations

from pal_adapters.methods.lhuc.config import LHUCOptions
from tests import plain
from tests.record import Record, Reference, Values


class LHUCReference(Reference):
    def _at(self, place: str, values: Values) -> bool:
        auto = "output" if values.post else "ffn"
        return place == (auto if self.options["lhuc_site"] == "auto" else self.options["lhuc_site"])

    def ffn(self, w: plain.Weights, o2: plain.Tensor, values: Values) -> plain.Tensor:
        return plain.scaled(o2, w) if self._at("ffn", values) else o2

    def output(self, w: plain.Weights, y: plain.Tensor, values: Values) -> plain.Tensor:
        return plain.scaled(y, w) if self._at("output", values) else y


RECORDS = [
    Record(
        options_class=LHUCOptions,
        reference=LHUCReference,
        variants=({"lhuc_site": "output"},),
        changes={"lhuc_site": "ffn"},
        counts=(({}, 9_216, 24_576),),  # L d
    )
]
