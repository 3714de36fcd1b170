"""Folding of LoRA sources into one LoRA adapter, in PEFT."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pal_adapters.errors import UnsupportedError
from pal_adapters.fusion.units import CombinedUnit, StackedSources

from .layers import VALUE, FusionLayer
from .sources import PREFIX, innermost


def fold_lora(
    found: list[tuple[str, FusionLayer, CombinedUnit]], truncate: int | None, common: Mapping[str, Any]
) -> tuple[LoraConfig, dict[str, Tensor], dict[str, float]]:
    """Config, tensors and truncation errors of the LoRA adapter."""
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    biased, transposed = {}, set()
    for place, layer, unit in found:
        group = unit.groups[0]
        assert isinstance(group, StackedSources)
        up, bias = group.scaled(unit.learned(VALUE).to(group.up.device))
        down, up = group.down, up.T
        if truncate is not None and truncate < down.shape[0]:
            down, up, errors[place] = _truncated(down, up, truncate)
        ranks[place] = down.shape[0]
        key = f"{PREFIX}{place}.lora_"
        if group.embedding:
            weights |= {f"{key}embedding_A": down, f"{key}embedding_B": up}
        else:
            weights |= {f"{key}A.weight": down, f"{key}B.weight": up}
            transposed.add(isinstance(innermost(layer._near[0]), Conv1D))
            biased[place] = torch.zeros(up.shape[0]) if bias is None else bias
    has_bias = any(bool(bias.any()) for bias in biased.values())
    if has_bias:
        if any(key.endswith("embedding_A") for key in weights):
            raise UnsupportedError(
                "the sources have lora_bias=True and LoRA on embeddings, which no PEFT adapter combines."
            )
        weights |= {f"{PREFIX}{place}.lora_B.bias": bias for place, bias in biased.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {re.escape(place): r for place, r in ranks.items() if r != rank}
    folded = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        fan_in_fan_out=transposed == {True},
        lora_bias=has_bias,
        **common,
    )
    return folded, {key: value.contiguous() for key, value in weights.items()}, errors


def _truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of `up @ down` of a given rank and its relative error, without forming the product."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    kept_up, kept_down = (q_up @ u[:, :rank]) * root, (root.unsqueeze(1) * v[:rank]) @ q_down.T
    rest = len(root)
    error = math.sqrt(s[rest:].square().sum().item() / max(s.square().sum().item(), 1e-300))
    if rest < rank:  # the module is narrower than `rank`
        kept_up = torch.nn.functional.pad(kept_up, (0, rank - rest))
        kept_down = torch.nn.functional.pad(kept_down, (0, 0, 0, rank - rest))
    return kept_down.to(down.dtype), kept_up.to(up.dtype), error
