"""The kinds of block that are recognised, and models that have them."""

from __future__ import annotations

from typing import Any

from .host import V5, Host, Spec, Stack

_BERT = Spec("output.LayerNorm", "attention.output.dropout", "intermediate", "output.dense", pre=False)
_LLAMA = Spec("input_layernorm", "self_attn", "mlp", "mlp")
_GPT2 = Spec("ln_1", "attn", "mlp", "mlp")
_CLIP = Spec("layer_norm1", "self_attn", "mlp", "mlp")
_BART = Spec("final_layer_norm", "self_attn", "fc1", "fc2", pre=False)
_MBART = Spec("self_attn_layer_norm", "self_attn", "fc1", "fc2")
_T5 = Spec("layer.0.layer_norm", "layer.0.dropout", "layer.-1.DenseReluDense", "layer.-1.DenseReluDense")
_GEMMA = Spec("input_layernorm", "post_attention_layernorm", "mlp", "post_feedforward_layernorm")
_VIT = Spec("layernorm_before", "attention", "mlp" if V5 else "intermediate", "mlp" if V5 else "output.dense")
_DINOV2 = Spec("norm1", "layer_scale1", "mlp", "layer_scale2")
_WAV2VEC2 = Spec("final_layer_norm", "dropout", "feed_forward", "feed_forward", pre=False)
_WAV2VEC2_PRE = Spec("layer_norm", "dropout", "feed_forward", "feed_forward")

_TEXT = dict(
    vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36,
    max_position_embeddings=40, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, pad_token_id=1,
)  # fmt: skip
_DECODER = dict(
    vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    intermediate_size=36, max_position_embeddings=64, attention_dropout=0.3, pad_token_id=1, bos_token_id=2,
    eos_token_id=3,
)  # fmt: skip
_SEQ2SEQ = dict(
    vocab_size=40, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=36, decoder_ffn_dim=36, max_position_embeddings=40, dropout=0.3, attention_dropout=0.3,
    activation_dropout=0.3, pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2,
    encoder_layerdrop=0.0, decoder_layerdrop=0.0, forced_eos_token_id=None,
)  # fmt: skip
_VISION = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36, image_size=8, patch_size=4,
    hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
)  # fmt: skip
_AUDIO = dict(
    vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36,
    hidden_dropout=0.3, attention_dropout=0.3, activation_dropout=0.3, feat_proj_dropout=0.0, layerdrop=0.0,
    conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, apply_spec_augment=False,
)  # fmt: skip
_CLIP_TEXT = dict(
    vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36,
    max_position_embeddings=40, attention_dropout=0.3, eos_token_id=39, bos_token_id=2, pad_token_id=1,
)  # fmt: skip
CLIP_VISION = dict(
    hidden_size=36, num_hidden_layers=3, num_attention_heads=2, intermediate_size=36, image_size=8, patch_size=4,
    attention_dropout=0.3,
)  # fmt: skip


def _encoder(name: str, model: str, path: str, spec: Spec = _BERT, **config: Any) -> Host:
    return Host(name, model, {**_TEXT, **config}, (Stack(path, spec),))


def _decoder(
    name: str, model: str, path: str, spec: Spec = _LLAMA, windows: tuple[int | None, ...] = (None,), **config: Any
) -> Host:
    values = {**_DECODER, **config}
    values = {k: v for k, v in values.items() if v is not ...}
    return Host(name, model, values, (Stack(path, spec, causal=True, windows=windows),))


def _seq2seq(name: str, model: str, spec: Spec, encoder: str = "encoder.layers", **config: Any) -> Host:
    stacks = (
        Stack(encoder, spec, part="encoder"),
        Stack(encoder.replace("encoder", "decoder"), spec, causal=True, part="decoder"),
    )
    return Host(name, model, {**_SEQ2SEQ, **config}, stacks)


_SLIDING = 4
_GPT = dict(
    vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=64, n_inner=36, resid_pdrop=0.3, attn_pdrop=0.3,
    embd_pdrop=0.3, pad_token_id=1, bos_token_id=2, eos_token_id=3,
)  # fmt: skip
_T5GEMMA = Spec("pre_self_attn_layernorm", "post_self_attn_layernorm", "mlp", "post_feedforward_layernorm")
_T5GEMMA_PART = dict(_DECODER, layer_types=["full_attention"] * 2, query_pre_attn_scalar=6)
_LOCAL = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=_SLIDING)

HOSTS: tuple[Host, ...] = (
    # Post-LN encoders
    _encoder("bert", "BertModel", "encoder.layer"),
    _encoder("roberta", "RobertaModel", "encoder.layer"),
    _encoder("xlm-roberta", "XLMRobertaModel", "encoder.layer"),
    _encoder("camembert", "CamembertModel", "encoder.layer"),
    _encoder("electra", "ElectraModel", "encoder.layer", embedding_size=12),
    _encoder("bert-generation", "BertGenerationEncoder", "encoder.layer"),
    _encoder("roformer", "RoFormerModel", "encoder.layer", embedding_size=24),
    _encoder("ernie", "ErnieModel", "encoder.layer"),
    _encoder("rembert", "RemBertModel", "encoder.layer", input_embedding_size=12),
    _encoder(
        "deberta", "DebertaModel", "encoder.layer", relative_attention=True, pos_att_type=["c2p", "p2c"],
        max_relative_positions=8, position_biased_input=False,
    ),
    _encoder(
        "deberta-v2", "DebertaV2Model", "encoder.layer", relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
    ),
    _encoder(
        "mpnet", "MPNetModel", "encoder.layer",
        Spec("output.LayerNorm", "attention.dropout", "intermediate", "output.dense", pre=False),
    ),
    Host(
        "distilbert",
        "DistilBertModel",
        dict(vocab_size=40, dim=24, n_layers=2, n_heads=2, hidden_dim=36, max_position_embeddings=40, dropout=0.3,
             attention_dropout=0.3, pad_token_id=1),
        (Stack("transformer.layer", Spec("output_layer_norm", "attention", "ffn", "ffn", pre=False)),),
    ),
    _encoder(
        "xmod", "XmodModel", "encoder.layer", languages=("en_XX",), default_language="en_XX", pre_norm=False,
        ln_before_adapter=True, adapter_reuse_layer_norm=False,
    ),
    _encoder(
        "xmod-pre", "XmodModel", "encoder.layer",
        Spec("attention.output.LayerNorm", "attention.output.dropout", "intermediate", "output.dense"),
        languages=("en_XX",), default_language="en_XX", pre_norm=True,
    ),
    Host(
        "openai-gpt",
        "OpenAIGPTModel",
        {k: v for k, v in _GPT.items() if k != "n_inner"},
        (Stack("h", Spec("ln_2", "attn", "mlp", "mlp", pre=False), causal=True),),
    ),
    # Pre-LN encoders
    _encoder(
        "esm", "EsmModel", "encoder.layer",
        Spec("attention.LayerNorm", "attention.output.dropout", "intermediate", "output.dense"),
        mask_token_id=4, token_dropout=False, position_embedding_type="rotary",
    ),
    Host(
        "modernbert",
        "ModernBertModel",
        dict(vocab_size=40, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=36,
             max_position_embeddings=40, attention_dropout=0.3, mlp_dropout=0.3, embedding_dropout=0.3, pad_token_id=1,
             local_attention=4, global_attn_every_n_layers=2, cls_token_id=2, sep_token_id=3, bos_token_id=2,
             eos_token_id=3, **({} if V5 else dict(reference_compile=False))),
        (Stack("layers", Spec("attn_norm", "attn", "mlp", "mlp"), windows=(None, 2)),),
    ),
    _encoder(
        "roberta-prelayernorm", "RobertaPreLayerNormModel", "encoder.layer",
        Spec("attention.LayerNorm", "attention.output.dropout", "intermediate.dense", "output.dense"),
    ),
    _encoder(
        "xlm-roberta-xl", "XLMRobertaXLModel", "encoder.layer",
        Spec("attention.self_attn_layer_norm", "attention.output.dropout", "intermediate", "output.dense"),
    ),
    _encoder(
        "nomic-bert", "NomicBertModel", "layers",
        Spec("post_mlp_layernorm", "post_attention_dropout", "mlp", "mlp", pre=False),
    ),
    # Decoders
    Host("gpt2", "GPT2LMHeadModel", _GPT, (Stack("transformer.h", _GPT2, causal=True),)),
    Host(
        "gpt-bigcode", "GPTBigCodeForCausalLM", {**_GPT, "multi_query": False},
        (Stack("transformer.h", _GPT2, causal=True),),
    ),
    Host(
        "gpt-neo",
        "GPTNeoForCausalLM",
        dict(vocab_size=40, hidden_size=24, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=2,
             intermediate_size=36, max_position_embeddings=64, resid_dropout=0.3, attention_dropout=0.3,
             embed_dropout=0.3, window_size=4, pad_token_id=1, bos_token_id=2, eos_token_id=3),
        (Stack("transformer.h", _GPT2, causal=True),),
    ),
    Host("gptj", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}, (Stack("transformer.h", _GPT2, causal=True),)),
    Host(
        "codegen", "CodeGenForCausalLM", {**_GPT, "rotary_dim": 4, "n_ctx": 64, "n_head": 4},
        (Stack("transformer.h", _GPT2, causal=True),),
    ),
    _decoder(
        "gpt-neox", "GPTNeoXForCausalLM", "gpt_neox.layers",
        Spec("input_layernorm", "post_attention_dropout", "mlp", "mlp"), hidden_dropout=0.3, num_key_value_heads=...,
        head_dim=..., use_parallel_residual=True,
    ),
    _decoder(
        "gpt-neox-sequential", "GPTNeoXForCausalLM", "gpt_neox.layers",
        Spec("input_layernorm", "post_attention_dropout", "mlp", "mlp"), hidden_dropout=0.3, num_key_value_heads=...,
        head_dim=..., use_parallel_residual=False,
    ),
    _decoder("llama", "LlamaForCausalLM", "model.layers"),
    _decoder("mistral", "MistralForCausalLM", "model.layers", windows=(_SLIDING,), sliding_window=_SLIDING),
    _decoder("qwen2", "Qwen2ForCausalLM", "model.layers", head_dim=...),
    _decoder("qwen3", "Qwen3ForCausalLM", "model.layers", windows=(_SLIDING, None), use_sliding_window=True, **_LOCAL),
    _decoder("gemma", "GemmaForCausalLM", "model.layers"),
    _decoder(
        "gemma2", "Gemma2ForCausalLM", "model.layers", _GEMMA, windows=(_SLIDING, None), query_pre_attn_scalar=6,
        attn_logit_softcapping=None, **_LOCAL,
    ),
    _decoder(
        "gemma3", "Gemma3ForCausalLM", "model.layers", _GEMMA, windows=(_SLIDING, None), query_pre_attn_scalar=6,
        **_LOCAL,
    ),
    _decoder("granite", "GraniteForCausalLM", "model.layers", residual_multiplier=0.22, head_dim=...),
    _decoder(
        "olmo2", "Olmo2ForCausalLM", "model.layers",
        Spec("", "post_attention_layernorm", "mlp", "post_feedforward_layernorm"), head_dim=...,
    ),
    _decoder(
        "glm4", "Glm4ForCausalLM", "model.layers",
        Spec("input_layernorm", "post_self_attn_layernorm", "mlp", "post_mlp_layernorm"), head_dim=8,
    ),
    _decoder(
        "granitemoe", "GraniteMoeForCausalLM", "model.layers",
        Spec("input_layernorm", "self_attn", "block_sparse_moe", "block_sparse_moe"), residual_multiplier=0.22,
        num_local_experts=3, num_experts_per_tok=2, head_dim=...,
    ),
    _decoder(
        "apertus", "ApertusForCausalLM", "model.layers", Spec("attention_layernorm", "self_attn", "mlp", "mlp"),
        head_dim=...,
    ),
    _decoder(
        "vaultgemma", "VaultGemmaForCausalLM", "model.layers", windows=(_SLIDING, None), query_pre_attn_scalar=6,
        attn_logit_softcapping=None, **_LOCAL,
    ),
    _decoder(
        "llama4", "Llama4ForCausalLM", "model.layers",
        Spec("input_layernorm", "self_attn", "feed_forward", "feed_forward"), num_local_experts=3,
        num_experts_per_tok=1, intermediate_size_mlp=36,
    ),
    _decoder("olmo", "OlmoForCausalLM", "model.layers", head_dim=...),
    _decoder(
        "phi3", "Phi3ForCausalLM", "model.layers", Spec("input_layernorm", "resid_attn_dropout", "mlp", "mlp"),
        resid_pdrop=0.3, embd_pdrop=0.3, head_dim=..., sliding_window=None,
    ),
    _decoder(
        "phi", "PhiForCausalLM", "model.layers", resid_pdrop=0.3, embd_pdrop=0.3, head_dim=..., num_attention_heads=2,
    ),
    _decoder("stablelm", "StableLmForCausalLM", "model.layers", hidden_dropout=0.3, head_dim=...),
    _decoder(
        "stablelm-parallel", "StableLmForCausalLM", "model.layers", hidden_dropout=0.3, head_dim=...,
        use_parallel_residual=True,
    ),
    _decoder("cohere", "CohereForCausalLM", "model.layers", head_dim=..., logit_scale=1.0),
    _decoder("starcoder2", "Starcoder2ForCausalLM", "model.layers", residual_dropout=0.3, head_dim=...,
    sliding_window=None),
    _decoder(
        "qwen2-moe", "Qwen2MoeForCausalLM", "model.layers", num_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=12, shared_expert_intermediate_size=12, head_dim=...,
    ),
    _decoder(
        "mixtral", "MixtralForCausalLM", "model.layers",
        _LLAMA if V5 else Spec("input_layernorm", "self_attn", "block_sparse_moe", "block_sparse_moe"),
        num_local_experts=3, num_experts_per_tok=2, sliding_window=None,
    ),
    Host(
        "opt",
        "OPTForCausalLM",
        dict(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, ffn_dim=36,
             max_position_embeddings=64, dropout=0.3, attention_dropout=0.3, word_embed_proj_dim=24, pad_token_id=1,
             bos_token_id=2, eos_token_id=3),
        (Stack("model.decoder.layers", _MBART, causal=True),),
    ),
    Host(
        "opt-post",
        "OPTForCausalLM",
        dict(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, ffn_dim=36,
             max_position_embeddings=64, dropout=0.3, attention_dropout=0.3, word_embed_proj_dim=12, pad_token_id=1,
             bos_token_id=2, eos_token_id=3, do_layer_norm_before=False),
        (Stack("model.decoder.layers", _BART, causal=True),),
    ),
    _decoder(
        "falcon", "FalconForCausalLM", "transformer.h", Spec("input_layernorm", "self_attention", "mlp", "mlp"),
        hidden_dropout=0.3, head_dim=..., multi_query=True, parallel_attn=True, new_decoder_architecture=False,
    ),
    _decoder(
        "falcon-sequential", "FalconForCausalLM", "transformer.h",
        Spec("input_layernorm", "self_attention", "mlp", "mlp"), hidden_dropout=0.3, head_dim=..., multi_query=False,
        parallel_attn=False, new_decoder_architecture=False, alibi=True,
    ),
    _decoder(
        "falcon-new", "FalconForCausalLM", "transformer.h", Spec("ln_attn", "self_attention", "mlp", "mlp"),
        hidden_dropout=0.3, head_dim=..., num_kv_heads=2, new_decoder_architecture=True,
    ),
    Host(
        "bloom",
        "BloomForCausalLM",
        dict(vocab_size=40, hidden_size=24, n_layer=2, n_head=2, hidden_dropout=0.3, attention_dropout=0.3,
             pad_token_id=1, bos_token_id=2, eos_token_id=3),
        (Stack("transformer.h", Spec("input_layernorm", "self_attention.dense", "mlp", "mlp.dense_4h_to_h"),
        causal=True),),
    ),
    # Encoder-decoders
    _seq2seq("bart", "BartModel", _BART),
    _seq2seq("plbart", "PLBartModel", _BART),
    _seq2seq("marian", "MarianModel", _BART),
    _seq2seq("blenderbot-small", "BlenderbotSmallModel", _BART),
    _seq2seq("mbart", "MBartModel", _MBART),
    _seq2seq("pegasus", "PegasusModel", _MBART),
    _seq2seq("m2m100", "M2M100Model", _MBART),
    _seq2seq("blenderbot", "BlenderbotModel", _MBART),
    *(
        Host(
            name,
            model,
            dict(vocab_size=40, d_model=24, d_kv=6, d_ff=36, num_layers=2, num_decoder_layers=2, num_heads=4,
                 dropout_rate=0.3, feed_forward_proj=ff, pad_token_id=1, eos_token_id=3, decoder_start_token_id=2,
                 relative_attention_num_buckets=8),
            (
                Stack("encoder.block", _T5, part="encoder"),
                Stack("decoder.block", _T5, causal=True, part="decoder"),
            ),
        )
        for name, model, ff in (("t5", "T5Model", "relu"), ("mt5", "MT5Model", "gated-gelu"))
    ),
    Host(
        "t5gemma",
        "T5GemmaModel",
        dict(dropout_rate=0.3, pad_token_id=1, bos_token_id=2, eos_token_id=3, vocab_size=40),
        (
            Stack("encoder.layers", _T5GEMMA, part="encoder"),
            Stack("decoder.layers", _T5GEMMA, causal=True, part="decoder"),
        ),
        sub=dict(encoder=_T5GEMMA_PART, decoder=_T5GEMMA_PART),
    ),
    Host(
        "whisper",
        "WhisperModel",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 40,
        "apply_spec_augment": False},
        (
            Stack("encoder.layers", _MBART, part="audio"),
            Stack("decoder.layers", _MBART, causal=True, part="decoder"),
        ),
    ),
    # Vision and audio
    Host("vit", "ViTModel", _VISION, (Stack("layers" if V5 else "encoder.layer", _VIT, part="vision"),)),
    Host("deit", "DeiTModel", _VISION, (Stack("layers" if V5 else "encoder.layer", _VIT, part="vision"),)),
    Host(
        "beit", "BeitModel",
        {**_VISION, "layer_scale_init_value": 0.1, "use_relative_position_bias": True, "drop_path_rate": 0.0,
         "use_mean_pooling": False},
        (Stack("layers" if V5 else "encoder.layer", _VIT, part="vision"),),
    ),
    Host(
        "pixio", "PixioModel", {**_VISION, "mlp_ratio": 1, "n_cls_tokens": 1},
        (Stack("layers", Spec("layernorm_before", "attention", "mlp", "mlp"), part="vision"),),
    ),
    Host("dinov2", "Dinov2Model", {**_VISION, "mlp_ratio": 1}, (Stack("encoder.layer", _DINOV2, part="vision"),)),
    Host(
        "clip",
        "CLIPModel",
        dict(projection_dim=8),
        (
            Stack("text_model.encoder.layers", _CLIP, causal=True),
            Stack("vision_model.encoder.layers", _CLIP, part="vision"),
        ),
        sub=dict(text_config=_CLIP_TEXT, vision_config=CLIP_VISION),
    ),
    Host("wav2vec2", "Wav2Vec2Model", _AUDIO, (Stack("encoder.layers", _WAV2VEC2, part="audio"),)),
    Host(
        "wav2vec2-stable", "Wav2Vec2Model", {**_AUDIO, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        (Stack("encoder.layers", _WAV2VEC2_PRE, part="audio"),),
    ),
    Host("hubert", "HubertModel", _AUDIO, (Stack("encoder.layers", _WAV2VEC2, part="audio"),)),
    Host("wavlm", "WavLMModel", _AUDIO, (Stack("encoder.layers", _WAV2VEC2, part="audio"),)),
)  # fmt: skip

ALBERT = Host(
    "albert",
    "AlbertModel",
    dict(vocab_size=40, embedding_size=12, hidden_size=24, num_hidden_layers=3, num_attention_heads=2,
         intermediate_size=36, max_position_embeddings=40, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
         pad_token_id=1, hidden_act="gelu"),
    (
        Stack(
            "encoder.albert_layer_groups.0.albert_layers",
            Spec("full_layer_layer_norm", "attention.output_dropout", "ffn", "ffn_output", pre=False),
        ),
    ),
)  # fmt: skip
BY_NAME = {host.name: host for host in (*HOSTS, ALBERT)}
