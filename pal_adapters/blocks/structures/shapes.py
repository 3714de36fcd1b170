"""Shapes that many rows share."""

from __future__ import annotations

from typing import Any, Literal

from ..block_sites import BlockSites

FC = "self_attn self_attn_layer_norm fc1 fc2 final_layer_norm [activation_fn] "
CROSS = "[encoder_attn] [encoder_attn_layer_norm]"


def layers(*prefixes: str, suffix: str = "") -> tuple[str, ...]:
    """Names of the encoder and decoder blocks of models."""
    return tuple(f"{p}{part}Layer{suffix}" for p in prefixes for part in ("Encoder", "Decoder"))


def pre(attention: str, ffn: str, norm: str, **changes: Any) -> BlockSites:
    """Pre-LN sites; each branch is one module, which returns the branch's output, unless `changes` say otherwise."""
    branches = {"attention_output": attention, "ffn_output": ffn}
    return BlockSites("pre", attention=attention, ffn=ffn, input_norm=norm, **{**branches, **changes})


def fc(norm: Literal["pre", "post"]) -> BlockSites:
    """BART's parts, which drop out with a function behind `fc2`: the term goes behind that."""
    parts = ("self_attn", "self_attn", "fc1", "fc2")
    if norm == "pre":
        return BlockSites("pre", *parts, residual="", input_norm="self_attn_layer_norm")
    return BlockSites("post", *parts, output="final_layer_norm", residual="final_layer_norm", residual_at="input")
