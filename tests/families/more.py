"""Tiny models of further families: from the defaults of their configs, made small by the names of the fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

from tests.zoo import Host, Spec, Stack

_WIDTH, _HEADS, _DEPTH = 24, 4, 2
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads"),
                    _HEADS),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"),
                    _DEPTH),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "dff", "moe_intermediate_size",
                     "shared_expert_intermediate_size", "shared_intermediate_size", "d_ff"), 36),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    "vocab_size": 40, "num_key_value_heads": 2, "head_dim": 6, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1,
    "state_size": 4, "image_size": 8, "patch_size": 2, "mamba_d_state": 4, "mamba_n_heads": 6, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_expand": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 6, "linear_value_head_dim": 6,
}  # fmt: skip
_NOWHERE = Spec("", "", "", "")


@dataclass(frozen=True)
class SmallHost(Host):
    """A kind of model whose values are compared with the model itself alone, and so needs no `Spec`."""

    def build_config(self, **changes: Any) -> Any:
        config_class = getattr(transformers, self.model).config_class
        known = config_class().to_dict()
        values = {name: value for name, value in SMALL.items() if name in known}
        values |= {name: 0.0 for name, value in known.items() if "dropout" in name and isinstance(value, float)}
        return config_class(**{**values, **self.config, **changes})


def _host(name: str, model: str, part: str = "text", *, causal: bool = False, **config: Any) -> Host:
    parts = ("encoder", "decoder") if part == "both" else (part,)
    stacks = tuple(Stack("", _NOWHERE, causal=causal or p == "decoder", part=p) for p in parts)
    return SmallHost(name, model, config, stacks)


def _decoder(name: str, model: str, **config: Any) -> Host:
    return _host(name, model, causal=True, **config)


_HYBRID = ["linear_attention", "full_attention"]
MORE: tuple[Host, ...] = (
    _decoder("mamba", "MambaForCausalLM"),
    _decoder("mamba2", "Mamba2ForCausalLM", num_heads=8, head_dim=6, n_groups=1, chunk_size=4),
    _decoder("falcon-mamba", "FalconMambaForCausalLM"),
    _decoder("jamba", "JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2),
    _decoder("bamba", "BambaForCausalLM", attn_layer_indices=[1]),
    _decoder("falcon-h1", "FalconH1ForCausalLM", mamba_d_ssm=48),
    _decoder("granitemoehybrid", "GraniteMoeHybridForCausalLM", layer_types=["mamba", "attention"]),
    _decoder("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    _decoder("qwen3-next", "Qwen3NextForCausalLM", layer_types=_HYBRID),
    _decoder("qwen3.5", "Qwen3_5ForCausalLM", layer_types=_HYBRID),
    _decoder("olmo-hybrid", "OlmoHybridForCausalLM", layer_types=_HYBRID),
    _decoder("recurrent-gemma", "RecurrentGemmaForCausalLM", lru_width=24, attention_window_size=4,
             block_types=["recurrent", "attention"]),
    _decoder("nemotron-h", "NemotronHForCausalLM", layers_block_type=["mamba", "attention", "moe"]),
    _decoder(
        "gemma3n", "Gemma3nForCausalLM", num_kv_shared_layers=0, activation_sparsity_pattern=None, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=40, laurel_rank=2,
        hidden_size_per_layer_input=4,
    ),
    _decoder("gemma4", "Gemma4ForCausalLM", per_layer_config={}),
    _decoder("hyperclovax", "HyperCLOVAXForCausalLM"),
    _decoder("afmoe", "AfmoeForCausalLM"),
    _decoder("jetmoe", "JetMoeForCausalLM"),
    _decoder("doge", "DogeForCausalLM"),
    _decoder("zaya", "ZayaForCausalLM", num_experts_per_tok=1),
    _decoder("mpt", "MptForCausalLM"),
    _decoder("ctrl", "CTRLLMHeadModel"),
    _decoder("moshi", "MoshiForCausalLM", sliding_window=4, ffn_dim=36),
    _decoder("hy-v4", "HYV4ForCausalLM"),
    _host("megatron-bert", "MegatronBertModel"),
    _host("big-bird", "BigBirdModel", block_size=16),
    _host("longformer", "LongformerModel", attention_window=[4, 4]),
    _host("fnet", "FNetModel"),
    _host("switch-transformers", "SwitchTransformersForConditionalGeneration", "both", d_kv=6, num_heads=4,
          num_decoder_layers=2, decoder_start_token_id=1, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    _host("nllb-moe", "NllbMoeForConditionalGeneration", "both", decoder_start_token_id=2),
    _host("led", "LEDForConditionalGeneration", "both", attention_window=[4, 4], max_encoder_position_embeddings=64,
          max_decoder_position_embeddings=64, decoder_start_token_id=2),
    _host("swin", "SwinModel", "vision", embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=2),
    _host("segformer", "SegformerModel", "vision", hidden_sizes=[8, 8, 12, 12], num_attention_heads=[1, 1, 2, 2],
          depths=[1, 1, 1, 1], sr_ratios=[2, 1, 1, 1]),
    _host("aimv2", "Aimv2VisionModel", "vision"),
)  # fmt: skip
