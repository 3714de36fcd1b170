"""Blocks that no row can describe, or that fit one by the names of their children and compute something else."""

from __future__ import annotations

_OTHER_SUMS = "its residual sums are not those of the models with equal module names"
_TOKENS_FIRST = "its tokens come before the examples of the batch"
_TWO_STREAMS = "its attention adds the residual itself, and two streams of tokens share its modules"
_CHANNELS_FIRST = "its channels come before its tokens"
_POOLS = "it changes the length of the sequence"

# By class: why it is rejected.
REFUSED: dict[str, str] = {
    "BridgeTowerResidualAttention": _TOKENS_FIRST,
    "XLNetLayer": _TWO_STREAMS,
    "VitDetLayer": _CHANNELS_FIRST,
    "GraniteSpeech5EncoderSubsamplingBlock": _POOLS,
    "MobileBertLayer": "its attention is narrower than its residual stream",
    "ProphetNetEncoderLayer": "it gets an attention mask for each head",
    "ProphetNetDecoderLayer": "it predicts several tokens in streams of their own, which its sequence holds",
    "PegasusXEncoderLayer": "it has a second sequence of global tokens",
    "PatchTSTEncoderLayer": "its hidden states have four dimensions",
    "CLIPSegDecoderLayer": _OTHER_SUMS,
    "ChameleonSwinDecoderLayer": _OTHER_SUMS,
}

# By class: blocks that their model runs at several depths, although they stand in it once.
REPEATED: frozenset[str] = frozenset({"AlbertLayer"})
