"""The kinds of block that are found without the user's help: data for `sites.py`, one row a kind.

A row fits a block whose direct children are *exactly* those that it lists. One more child, a parameter of the block
itself or a number that it multiplies with would mean that its sums are built in another way, and a module attached by
guess would be wrong without a sign of it; such a block is left alone, and the user names its sites. The forward
functions of all blocks that a row fits in transformers 4.57 and 5 have been read; those that fit by name but compute
something else are in `REFUSED`, or told apart by the row's `classes` and `flags`. `REPEATED` lists the blocks that a
model runs at several depths.
"""

from __future__ import annotations

from ..block_sites import Structure
from .audio import AUDIO
from .decoders import DECODERS
from .encoders import ENCODERS
from .hybrids import HYBRIDS
from .refused import REFUSED as REFUSED
from .refused import REPEATED as REPEATED
from .two_stacks import TWO_STACKS
from .vision import VISION

# Rows that ask for more come first: another row may list the same children.
STRUCTURES: tuple[Structure, ...] = tuple(
    sorted(
        (*ENCODERS, *DECODERS, *HYBRIDS, *TWO_STACKS, *VISION, *AUDIO),
        key=lambda row: (not (row.classes or row.flags), not row.inner),
    )
)
