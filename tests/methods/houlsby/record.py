"""The records of the Houlsby family."""

from __future__ import annotations

from pal_adapters.blocks.sites import Block
from pal_adapters.methods.houlsby.config import HoulsbyOptions, HoulsbyPALOptions, ParallelHoulsbyOptions
from pal_adapters.methods.houlsby.layer import HoulsbyBottleneck
from tests import plain
from tests.record import Record, Reference, Values


class ParallelHoulsbyReference(Reference):
    def attention(self, w: plain.Weights, o1: plain.Tensor, values: Values | None = None) -> plain.Tensor:
        return o1 + plain.low_rank(o1, w, "attention.")

    def term(self, w: plain.Weights, values: Values) -> plain.Tensor:
        return plain.low_rank(values.h, w, "ffn.")


class HoulsbyPALReference(Reference):
    def attention(self, w: plain.Weights, o1: plain.Tensor, values: Values | None = None) -> plain.Tensor:
        return o1 + plain.low_rank(o1, w, "attention.")

    def term(self, w: plain.Weights, values: Values) -> plain.Tensor:
        return plain.pal(values.h, w, values.keep, heads=self.options["num_heads"], prefix="pal.")


class HoulsbyReference(Reference):
    """Weights of the bottleneck behind attention are below `attention.`, those of the other one below `ffn.`."""

    def attention(self, w: plain.Weights, o1: plain.Tensor, values: Values | None = None) -> plain.Tensor:
        return plain.houlsby(o1, plain.under(w, "attention."))

    def ffn(self, w: plain.Weights, o2: plain.Tensor, values: Values) -> plain.Tensor:
        return plain.houlsby(o2, plain.under(w, "ffn."))


def _bottleneck(options: HoulsbyOptions, block: Block) -> HoulsbyBottleneck:
    unit = HoulsbyBottleneck(
        block.width, options.hidden_size, activation=options.activation, init_std=options.init_std
    )
    unit.source = ()
    return unit


RECORDS = [
    Record(
        options_class=ParallelHoulsbyOptions,
        reference=ParallelHoulsbyReference,
        options={"hidden_size": 6},
        wider={"hidden_size": 9},
        changes={"hidden_size": 4},
        counts=(({}, 1_862_832, 4_966_752),),  # 2 L (2 d r + r + d)
    ),
    Record(
        options_class=HoulsbyPALOptions,
        reference=HoulsbyPALReference,
        options={"hidden_size": 12, "num_heads": 3, "bottleneck_size": 5},
        wider={"bottleneck_size": 7},
        variants=({"num_heads": 2},),
        changes={"bottleneck_size": 3, "dropout": 0.5},
        counts=(({}, 2_053_668, 4_567_468),),
        attends=True,
        shares=True,
    ),
    Record(
        options_class=HoulsbyOptions,
        reference=HoulsbyReference,
        options={"hidden_size": 6},
        wider={"hidden_size": 9},
        variants=({"activation": "relu"},),
        changes={"activation": "relu", "init_std": 0.5, "train_layernorm": False},
        together={"train_layernorm": False},
        parts=lambda depth: 4 * depth + 1,  # two bottlenecks and two norms a block, and the norm of the embeddings
        build=_bottleneck,
    ),
]
