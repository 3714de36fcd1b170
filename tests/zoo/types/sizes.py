"""Small values for the fields of any config, by the names of the fields."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VOCABULARY = 128
CONTEXT = 128


@dataclass(frozen=True)
class Size:
    """How large a tiny model is.

    Attributes:
        width: of the residual stream.
        heads: of attention.
        kv_heads: heads of keys and values.
        depth: blocks of a stack.
        image: height and width of an image.
        patch: those of a patch.
    """

    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    depth: int = 2
    image: int = 32
    patch: int = 8

    @property
    def head(self) -> int:
        return self.width // self.heads


# Tried in this order: some models want as many heads of keys as of queries, wide ones or large images.
SIZES = (
    Size(),
    Size(kv_heads=4),
    Size(width=64, kv_heads=4),
    Size(width=64, heads=2, image=64, patch=16),
    Size(depth=4),
    Size(width=128, heads=8, kv_heads=8, depth=4, image=224, patch=16),
)

_Rule = tuple[re.Pattern[str], Callable[[int, Size], int]]


def _keep(value: int, size: Size) -> int:
    return value


def _at_most(limit: int) -> Callable[[int, Size], int]:
    return lambda value, size: min(value, limit)


def _rule(words: str, value: Callable[[int, Size], int]) -> _Rule:
    return re.compile(words, re.VERBOSE), value


# The first rule whose words are found in a field's name decides; a field that no rule knows stays as it is.
_RULES: tuple[_Rule, ...] = (
    _rule(r"type_vocab", _keep),
    _rule(r"vocab_size|n_vocab$|^codebook_size$|^n_tokens$", lambda v, s: VOCABULARY),
    _rule(r"(^|_)(image|img)_size$", lambda v, s: s.image),
    _rule(r"^(encoder_)?patch_size$", lambda v, s: s.patch),
    _rule(r"^max_source_positions$", lambda v, s: 20 if v == 1500 else CONTEXT),
    _rule(
        r"^(max_(position_embeddings|target_positions|seq_len|sequence_length)|n_positions|n_ctx|seq_length"
        r"|model_max_length|original_max_position_embeddings|context_length)$",
        _at_most(CONTEXT),
    ),
    _rule(
        r"^(sliding_window(_size)?|attention_window_size|local_attention(_window)?|window_size|attention_chunk_size)$",
        _at_most(8),
    ),
    _rule(r"experts_per_to|moe_top_?k|^moe_k$|top_k_experts|selected_experts|moe_num_active|expert_top_k",
          _at_most(2)),
    _rule(r"^(n_group|topk_groups?|num_expert_group)$", lambda v, s: 1),
    _rule(r"^n(um)?_shared_experts?$", _at_most(1)),
    _rule(r"experts?$|^moe_num_experts$", _at_most(4)),
    _rule(r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index|attn_layer_offset|expert_layer_offset)$",
          _at_most(1)),
    _rule(r"interval$|every_n_layers$|window_pattern$|layer_period$|moe_layer_step$|layers?_interval$", _at_most(2)),
    _rule(r"mtp|nextn|kv_shared_layers", lambda v, s: 0),
    _rule(r"^max_window_layers$", _at_most(1)),
    _rule(r"rope.*head_dim$", lambda v, s: s.head if v >= 8 else v),
    _rule(r"head_dim$|^d_kv$|^(attention_)?head_size$|size_per_head|^kv_channels$|^d_head$|^dim_(per_)?head$",
          lambda v, s: s.head),
    _rule(r"(key_value|kv|num_key)_?n?_heads|^num_key_value|^n_kv", lambda v, s: s.kv_heads),
    _rule(r"(^|_)(n_?heads?|num_heads?|attention_heads|heads|num_(v|kda)_heads|head_num)(_|$)", lambda v, s: s.heads),
    _rule(r"_rank$|lora_r$", _at_most(16)),
    _rule(r"(state_size|d_state)$", _at_most(8)),
    _rule(r"moe.*(intermediate|ffn)", lambda v, s: s.width),
    _rule(
        r"interm|ffn_(dim|hidden|size|emb)|^d_ff$|^dff$|n_inner|d_inner|mlp_(dim|hidden)|feed_?forward_?(dim|size)"
        r"|^ff_dim|inner_dim|expand_dim",
        lambda v, s: 2 * s.width,
    ),
    _rule(r"feature_layer|feat_extract", _keep),
    _rule(r"(^|_)(n_)?layers?$|^depth$|_depth$|num_blocks|n_block|num_hidden_groups|^num_layers",
          lambda v, s: min(v, s.depth)),
    _rule(r"^num_conv_pos_embeddings$", lambda v, s: 4),
    _rule(r"^num_conv_pos_embedding_groups$", lambda v, s: 2),
    _rule(r"^projection_dim$", lambda v, s: 16),
    _rule(
        r"num_channels|patch|image|img|window|kernel|chunk|group|max_|stride|conv_size|label|in_chan|input_channels"
        r"|block_size|batch|frame|tubelet|mel|sampl|hop|pool|context|buckets?|beam|top_k|n_fft|codevector|class"
        r"|temporal|crop|grid|num_rbf|rotary_dim|d_conv|logit|router|seq_len|feature_size|spatial|quer(y|ies)"
        r"|rope_dim$|compress|negatives|out_channels_",
        _keep,
    ),
    _rule(
        r"hidden_size|d_model|n_embd|^dim$|embed(ding)?_(dim|size)|hidden_dim|^width$|_dim$|_size$|_width$|^channels$"
        r"|_channels$|d_embed",
        lambda v, s: s.width if v > 8 else v,
    ),
)  # fmt: skip
_TOKEN = re.compile(r"_token_(id|ids|index)$|^(image|video|audio)_token$")
_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "sep": 2, "cls": 1, "mask": 3, "unk": 4}
_KINDS = ("layer_types", "layers_block_type", "block_types", "layers_types", "mlp_layer_types")
_DROPPED = frozenset(
    {"model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "id2label",
     "label2id", "out_features", "_out_features", "out_indices", "_out_indices", "stage_names",
     "attn_implementation", "_attn_implementation", "experts_implementation"}
)  # fmt: skip


def _number(name: str, value: int, size: Size) -> int:
    for words, make in _RULES:
        if words.search(name.lower()):
            return make(value, size)
    return value


def _kinds(config: dict[str, Any], depth: int) -> list[str]:
    """One block of each kind that a hybrid has, in the order in which they first appear."""
    lists = [config[name] for name in _KINDS[:-1] if isinstance(config.get(name), (list, tuple))]
    kinds = list(dict.fromkeys(kind for kind in (lists[0] if lists else ()) if isinstance(kind, str)))
    return (kinds * depth)[:depth] if kinds and len(kinds) < depth else kinds


def _list(name: str, values: list[Any], config: dict[str, Any], size: Size) -> list[Any]:
    """A shorter list: of one value a block, of indices of blocks, or of sizes of stages."""
    numbers = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    whole = len(values) == config.get("num_hidden_layers")
    if name == "mlp_layer_types":
        return (list(dict.fromkeys(values)) * size.depth)[: size.depth]
    if whole and len(values) > size.depth:
        return [_number(name, v, size) if numbers else v for v in values[: size.depth]]
    if not numbers:
        return values[: size.depth] if isinstance(values[0], str) and "layer" in name else values
    if name in ("conv_dim", "tdnn_dim"):
        return [16 if name == "conv_dim" else 32] * len(values)
    if (
        len(values) > size.depth
        and max(values) > 1
        and re.search(r"(?<!feature_)(layers?|layer_ids|ind(ex|ic)es)$", name)
    ):
        return [value for value in values if value < size.depth]
    if name in ("depths", "num_layers", "layers", "stage_depths", "stages"):
        return [min(value, 2) for value in values]
    if name in ("num_heads", "num_attention_heads"):
        return [2] * len(values)
    if "intermediate_size" in name:
        return [2 * size.width] * size.depth
    return [size.image] * len(values) if name in ("image_size", "img_size") else values


def _rope(values: dict[str, Any], size: Size) -> dict[str, Any]:
    """Position parameters, where the parts of a head that M-RoPE divides must sum up to half of it."""
    values = {name: _rope(value, size) if isinstance(value, dict) else value for name, value in values.items()}
    if values.get("mrope_section"):
        half = int(size.head * (values.get("partial_rotary_factor") or 1.0)) // 2
        part = max(half // 4, 1)
        values["mrope_section"] = [half - 2 * part, part, part]
    return values


def _token(name: str, value: Any, taken: list[int]) -> Any:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    word = name.partition("_token_")[0]
    if value is None or word in _TOKENS:
        return None if value is None else _TOKENS[word]
    taken.append(min(VOCABULARY - 6 + len(taken), VOCABULARY - 1))  # of images and others: one token each
    return taken[-1]


def small(config: dict[str, Any], size: Size) -> dict[str, Any]:
    """A config's fields with small values; configs inside it are made small too."""
    kinds, taken, result = _kinds(config, size.depth), [], {}
    size = Size(**{**vars(size), "depth": max(size.depth, len(kinds))})
    for name, value in config.items():
        if name in _DROPPED:
            continue
        if isinstance(value, dict):
            if name.startswith("rope"):
                value = _rope(value, size)
            elif name == "per_layer_config":
                value = {}
            elif "model_type" in value or name.endswith("_config") or name in ("encoder", "decoder", "generator"):
                kept = {"model_type": value["model_type"]} if "model_type" in value else {}
                value = small(value, size) | kept
        elif name in _KINDS[:-1] and kinds:
            value = kinds[: size.depth]
        elif _TOKEN.search(name):
            value = _token(name, value, taken)
        elif value is None and name == "head_dim":
            value = size.head
        elif isinstance(value, int) and not isinstance(value, bool):
            value = _number(name, value, size)
        elif isinstance(value, float) and re.search(r"drop(out)?(_(path_)?(rate|prob))?$|^drop_path|pdrop$", name):
            value = 0.0
        elif isinstance(value, (list, tuple)) and value:
            value = type(value)(_list(name, list(value), config, size))
        result[name] = value
    if "apply_spec_augment" in config:
        result["apply_spec_augment"] = False
    return result


_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_state": 8}
_SWIN = {"embed_dim": 16, "window_size": 2, "patch_size": 4}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0,
    },
}  # fmt: skip
_MROPE_TEXT = {"text_config": _MROPE}
_ONE = ("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups")
# What the names of the fields do not tell.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "head_dim": 8, "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 8, "v_head_dim": 8},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "state_size": 8},
    "nemotron": {"num_key_value_heads": 2},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glm_image"), _MROPE_TEXT),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "glm_image_text"), _MROPE),
    "glm4v_moe_text": {**_MROPE, "partial_rotary_factor": 1.0},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8,
                                      "time_stride": 8},
    **dict.fromkeys(("swin", "swinv2", "donut-swin"), _SWIN),
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3, "token_dropout": False},
    "squeezebert": {"embedding_size": 32, **dict.fromkeys(_ONE, 1)},
    "lilt": {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mistral4": {"head_dim": 8, "num_key_value_heads": 4, "v_head_dim": 8,
                 "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    "t5": {"decoder_start_token_id": 0},
}  # fmt: skip
