"""Blocks without attention, and the models that have some of them."""

from __future__ import annotations

from dataclasses import replace

from ..block_sites import Structure
from .shapes import pre

_LLAMA = pre("self_attn", "mlp", "input_layernorm")
_JAMBA = pre("self_attn", "feed_forward", "input_layernorm")
_LFM2 = pre("self_attn", "feed_forward", "operator_norm")
_SANDWICH_LFM = {"attention_output": "post_operator_norm", "ffn_output": "post_ffn_norm", "ffn_norm": "ffn_norm"}
_GRIFFIN = "temporal_pre_norm temporal_block channel_pre_norm mlp_block"
_MAMBA = {"mixing": "recurrent", "residual": ""}
_DELTA = ("BailingHybridDecoderLayer", "KimiLinearDecoderLayer")
_MINIMAX = tuple(f"{part}_{name}_factor" for part in ("attn", "mlp") for name in ("alpha", "beta"))
_LINEAR: dict[str, object] = {"block_type": "linear_attention"}

HYBRIDS: tuple[Structure, ...] = (
    Structure("mamba, mamba2, falcon-mamba", "norm mixer", pre("mixer", "mixer", "norm", **_MAMBA),
              classes=("MambaBlock", "Mamba2Block", "FalconMambaBlock")),
    Structure("nemotron-h, mamba", "norm mixer", pre("mixer", "mixer", "norm", **_MAMBA),
              classes=("NemotronHBlock",), flags=_LINEAR),
    Structure("nemotron-h, attention", "norm mixer", pre("mixer", "mixer", "norm", residual=""),
              classes=("NemotronHBlock",), flags={"block_type": "full_attention"}),
    Structure("nemotron-h, feed-forward", "norm mixer", pre("mixer", "mixer", "norm", residual="", mixing="other"),
              classes=("NemotronHBlock",)),
    Structure("zamba, zamba2", "mamba input_layernorm", pre("mamba", "mamba", "input_layernorm", **_MAMBA),
              classes=("ZambaMambaDecoderLayer", "Zamba2MambaDecoderLayer")),
    Structure("qwen3-next, qwen3.5, olmo-hybrid: a gated delta rule",
              "input_layernorm linear_attn post_attention_layernorm mlp",
              pre("linear_attn", "mlp", "input_layernorm", mixing="recurrent")),
    Structure("bailing-hybrid, kimi-linear: a gated delta rule",
              "input_layernorm self_attn post_attention_layernorm mlp", replace(_LLAMA, mixing="recurrent"),
              classes=_DELTA, flags=_LINEAR),
    Structure("jamba, bamba, attention", "self_attn feed_forward input_layernorm pre_ff_layernorm", _JAMBA),
    Structure("jamba, bamba, mamba", "mamba feed_forward input_layernorm pre_ff_layernorm",
              pre("mamba", "feed_forward", "input_layernorm", mixing="recurrent")),
    Structure("falcon-h1: attention and a state space model side by side",
              "feed_forward mamba self_attn input_layernorm pre_ff_layernorm", replace(_JAMBA, residual=""),
              scales=("attention_in_multiplier", "ssm_out_multiplier", "attn_out_multiplier")),
    Structure("granitemoehybrid, mamba: scales both branches",
              "input_layernorm mamba post_attention_layernorm [block_sparse_moe] shared_mlp",
              pre("mamba", "shared_mlp", "input_layernorm", **_MAMBA), scales=("residual_multiplier",)),
    Structure("lfm2, lfm2-moe, attention", "self_attn feed_forward operator_norm ffn_norm", _LFM2),
    Structure("lfm2, lfm2-moe, convolution", "conv feed_forward operator_norm ffn_norm",
              pre("conv", "feed_forward", "operator_norm", mixing="recurrent"),
              classes=("Lfm2DecoderLayer", "Lfm2MoeDecoderLayer")),
    Structure("lfm3, attention", "self_attn feed_forward operator_norm ffn_norm post_operator_norm post_ffn_norm",
              pre("self_attn", "feed_forward", "operator_norm", **_SANDWICH_LFM)),
    Structure("lfm3, convolution", "conv feed_forward operator_norm ffn_norm post_operator_norm post_ffn_norm",
              pre("conv", "feed_forward", "operator_norm", mixing="recurrent", **_SANDWICH_LFM),
              classes=("Lfm3DecoderLayer",)),
    Structure("recurrent-gemma, attention", _GRIFFIN,
              pre("temporal_block", "mlp_block", "temporal_pre_norm", ffn_norm="channel_pre_norm"),
              inner="temporal_block.q_proj"),
    Structure("recurrent-gemma, recurrent", _GRIFFIN,
              pre("temporal_block", "mlp_block", "temporal_pre_norm", ffn_norm="channel_pre_norm",
                  mixing="recurrent"),
              inner="temporal_block.rg_lru"),
    Structure("minimax: scales both branches; its generation cache has no place for further layers",
              "input_layernorm self_attn post_attention_layernorm mlp",
              replace(_LLAMA, residual="", mixing="other"), classes=("MiniMaxDecoderLayer",), scales=_MINIMAX),
    Structure("rwkv: its state is no generation cache of transformers", "[pre_ln] ln1 ln2 attention feed_forward",
              pre("attention", "feed_forward", "ln1", mixing="other"), classes=("RwkvBlock",)),
    Structure("xlstm: its state is no generation cache of transformers", "norm_mlstm mlstm_layer norm_ffn ffn",
              pre("mlstm_layer", "ffn", "norm_mlstm", residual="", mixing="other")),
)  # fmt: skip
