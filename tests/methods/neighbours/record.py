"""The record of the convolution."""

from __future__ import annotations

import importlib

import torch

import pal_adapters  # noqa: F401  (registers methods with each host that is installed)
from pal_adapters.hosts.method import REGISTERED
from tests import plain
from tests.record import Record, Reference, Values

from .config import NeighboursOptions

for _host, _installed in REGISTERED.items():
    if _installed:
        importlib.import_module(f"{__package__}.{_host}")


class NeighboursReference(Reference):
    def term(self, w: plain.Weights, values: Values) -> plain.Tensor:
        tokens = plain.linear(values.x, w, "projections.encoder")
        n = tokens.shape[1]
        rows = []
        for i in range(n):
            row = torch.zeros_like(tokens[:, 0])
            for k in (-1, 0, 1):
                if 0 <= i + k < n:
                    row = row + values.keep[:, 0, i, i + k, None] * w["taps"][k + 1] * tokens[:, i + k]
            seen = values.keep[:, 0, i, :, None]
            row = row + w["taps"][3] * (seen * tokens).sum(1) / seen.sum(1).clamp(min=1)
            rows.append(row)
        return plain.linear(plain.gelu(torch.stack(rows, dim=1)), w, "projections.decoder")


RECORDS = [
    Record(
        options_class=NeighboursOptions,
        reference=NeighboursReference,
        options={"hidden_size": 6},
        wider={"hidden_size": 9},
        changes={"hidden_size": 5, "dropout": 0.25},
        counts=(({}, 157_152, 418_752),),  # L (2 d r + r + d + 4 r)
        attends=True,
    )
]
