"""Adds a term to the attention scores through the additive attention mask.

DeBERTa's mask is boolean, but its attention adds the scores of relative positions, which a separate method computes:
the term is added to that method's result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.blocks.block_sites import BlockSites
from pal_adapters.blocks.origin import class_keys, files_of, uses
from pal_adapters.blocks.signatures import MASK

from .masks import normalise_mask

# In transformers 4.57 or 5, these files implement attention themselves, with an additive mask; the others use the
# common interface.
_ADDS_MASK = frozenset(
    f"modeling_{name}"
    for name in (
        "bert", "roberta", "xlm_roberta", "xlm_roberta_xl", "camembert", "electra", "mpnet", "openai", "distilbert",
        "bert_generation", "ernie", "roberta_prelayernorm", "esm", "gpt_neo", "bloom", "falcon", "rembert", "roformer",
        "megatron_bert", "lilt", "xmod", "roc_bert", "visual_bert", "tapas", "ibert", "vilt", "flava", "layoutlmv3",
        "convbert", "bros", "clvp", "imagegpt",
    )
)  # fmt: skip
# These do more with their mask than add it.
_READS_MASK = frozenset(
    f"modeling_{name}"
    for name in ("doge", "glm5_next", "granite_speech5", "minimax_m3_vl", "nemotron_asr_streaming", "parakeet")
)

# The methods that compute the scores of relative positions in DeBERTa-v2 and DeBERTa.
_POSITION_SCORES = ("disentangled_attention_bias", "disentangled_att_bias")


def position_scores(attention: nn.Module) -> tuple[nn.Module, str] | None:
    """The module inside a self-attention, and its method, that computes scores which are added, or None."""
    for module in attention.modules():
        for name in _POSITION_SCORES:
            if callable(getattr(module, name, None)):
                return module, name
    return None


def mask_argument(attention: nn.Module, positions: dict[str, int]) -> str | None:
    """The argument of a self-attention that is added to its scores, or None."""
    named = next((name for name in MASK if name in positions), None)
    # transformers 4.57, ViT: the only tensor that reaches the kernel, which adds it (sdpa) or multiplies (eager).
    return "head_mask" if named is None and "head_mask" in positions else named


def refusal(
    attention: nn.Module, sites: BlockSites, positions: dict[str, int], implementation: str | None
) -> str | None:
    """Why a self-attention takes no additive term, or None.

    Args:
        attention: the module.
        sites: the sites of its block.
        positions: its arguments.
        implementation: the model's `attn_implementation`.
    """
    if sites.mixing == "local":
        return "its attention sees parts of a text or an image, and takes no mask that shows them"
    if sites.mixing != "attention":
        return f"it has no attention scores, but a {type(attention).__name__}"
    if sites.mask != "kept":
        return "its self-attention takes a mask that is not added to its scores"
    if implementation not in (None, "eager", "sdpa"):
        return (
            f"attn_implementation={implementation!r} has no place for a term in its scores: load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    classes = {name for module in attention.modules() for name in class_keys(module)}
    scores = position_scores(attention)
    if scores is not None:
        if not getattr(scores[0], "relative_attention", False):
            return "its attention takes a mask of True and False, and adds nothing without relative_attention=True"
        if getattr(scores[0], "head_logits_proj", None) is not None:
            return "its heads mix their scores (talking_head=True)"
        return None
    argument = mask_argument(attention, positions)
    if argument is None:
        return "its self-attention takes no mask"
    eager = implementation == "eager"
    if argument == "head_mask" and eager:
        return "its eager attention multiplies by its only mask: load it with attn_implementation='sdpa'"
    if "MultiHeadSelfAttention" in classes and "DistilBertSelfAttention" not in classes and eager:
        return "its eager attention takes a mask of zeros and ones: load it with attn_implementation='sdpa'"
    wrapped = getattr(attention, "base_layer", attention)
    files = set(files_of(wrapped))
    if files & _READS_MASK:
        return "its self-attention chooses by its mask which tokens it sees"
    if not _repeats_fit(attention):
        return "it repeats its values too often when there is a mask (num_key_value_groups)"
    if files & _ADDS_MASK:
        return None
    if "position_bias" in positions:
        return "its blocks pass the sum of mask and position biases on to each other"
    if uses(wrapped, "ALL_ATTENTION_FUNCTIONS"):
        return None
    return f"it is not known whether {type(attention).__name__} adds its mask to the scores"


def _repeats_fit(attention: nn.Module) -> bool:
    """Whether repeating keys and values, which happens only with a mask, gives as many heads as the output has."""
    groups = getattr(attention, "num_key_value_groups", None)
    values = getattr(attention, "v_proj", None)
    output = getattr(attention, "o_proj", getattr(attention, "out_proj", None))
    if groups is None or not isinstance(values, nn.Linear) or not isinstance(output, nn.Linear):
        return True
    return bool(groups * values.out_features == output.in_features)


def add_to_scores(scores: Any, bias: Tensor, query: Tensor) -> Tensor:
    """The sum of the scores of `position_scores` and a term.

    Args:
        scores: `[b h, q, k]` or `[b, h, q, k]`, or 0.
        bias: `[b, 1, q, k]`, or `[1, 1, q, k]`.
        query: `[b h, q, d]` or `[b, h, q, d]`.
    """
    bias = bias.to(query.dtype)
    if query.dim() == 4:
        return scores + bias
    if bias.shape[0] == 1:
        return scores + bias[0]
    return scores + bias.squeeze(1).repeat_interleave(query.shape[0] // bias.shape[0], dim=0)


def past_length(cache: Any, layer: int) -> int:
    """How many tokens a generation cache holds for one block."""
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    return int(cache.get_seq_length(layer))


def with_bias(mask: Any, bias: Tensor, *, causal: bool, window: int | None, dtype: torch.dtype) -> Tensor:
    """An additive mask that hides what `mask` hides and adds `bias` to the rest.

    Args:
        mask: as the self-attention got it, in any form.
        bias: `[b, 1, q, k]`, or `[1, 1, q, k]`, for the keys that the self-attention sees.
        causal: whether the self-attention hides later positions.
        window: see `normalise_mask`.
        dtype: of the scores.

    Returns:
        `[b, h, q, k]`, with broadcast dimensions where heads or examples are equal.

    Raises:
        UnsupportedError: for a mask of an unknown form.
    """
    queries, keys = bias.shape[-2:]
    if isinstance(mask, Tensor) and mask.dim() == 4:
        # Static caches: slots that are not filled yet.
        bias = F.pad(bias, (0, mask.shape[-1] - keys))
        keys = mask.shape[-1]
    per_head = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] != 1 and mask.is_floating_point()
    if per_head:
        hidden: Tensor | None = mask
    else:
        hidden, is_causal = normalise_mask(
            mask, q_len=queries, kv_len=keys, causal=causal, device=bias.device, window=window
        )
        if is_causal:
            hidden = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril(keys - queries)[None, None]
    floor = torch.finfo(dtype).min
    bias = bias.to(dtype)
    if hidden is None:
        return bias
    if hidden.dtype == torch.bool:
        return bias.masked_fill(~hidden, floor)
    # The sum may leave the range of a narrow dtype, and a row of minus infinities would be NaN.
    return (bias + hidden.to(dtype)).clamp(min=floor)
