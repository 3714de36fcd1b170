"""The record of CA-MTL. One network serves all tasks, so its values are tested in this folder alone."""

from __future__ import annotations

from pal_adapters.methods.camtl.config import CAMTLOptions
from tests.record import Record, Reference

RECORDS = [
    Record(
        options_class=CAMTLOptions,
        reference=Reference,
        options={"tasks": ["rte", "mrpc"], "max_length": 16},
        changes={"tasks": ["one", "two"], "bottleneck": "none", "train_base": False},
        attends=True,
        shares=True,
    )
]
