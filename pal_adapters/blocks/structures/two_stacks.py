"""Models with an encoder and a decoder, and decoders of their kind."""

from __future__ import annotations

from dataclasses import replace

from ..block_sites import BlockSites, Structure
from .shapes import CROSS, FC, fc, layers, pre

_DECODERS = ("BioGpt", "XGLM", "Musicgen", "MusicgenMelody", "BigBirdPegasus", "PegasusX")
_WHISPER = (
    "AudioFlamingo3", "Qwen2Audio", "Voxtral", "Qwen3ASRAudio", "Qwen3OmniMoeAudio", "Qwen2_5OmniAudio",
)  # fmt: skip

TWO_STACKS: tuple[Structure, ...] = (
    Structure(
        "t5, mt5, umt5",
        "layer",
        BlockSites(
            "pre", "layer.0.SelfAttention", "layer.0.dropout", "layer.-1.DenseReluDense", "layer.-1.dropout",
            input_norm="layer.0.layer_norm",
        ),
    ),
    Structure(
        "t5gemma: a norm stands behind each branch, and one dropout module serves all",
        "pre_self_attn_layernorm self_attn post_self_attn_layernorm pre_feedforward_layernorm mlp "
        "post_feedforward_layernorm dropout [pre_cross_attn_layernorm] [cross_attn] [post_cross_attn_layernorm]",
        BlockSites(
            "pre", "self_attn", "post_self_attn_layernorm", "mlp", "post_feedforward_layernorm",
            residual="", input_norm="pre_self_attn_layernorm", ffn_norm="pre_feedforward_layernorm",
        ),
    ),
    Structure(
        "the decoder of t5gemma2: its attention sees the encoder's tokens behind its own",
        "pre_self_attn_layernorm self_attn post_self_attn_layernorm pre_feedforward_layernorm mlp "
        "post_feedforward_layernorm dropout",
        pre("self_attn", "mlp", "pre_self_attn_layernorm", attention_output="post_self_attn_layernorm",
            ffn_output="post_feedforward_layernorm", residual="", ffn_norm="pre_feedforward_layernorm",
            mixing="other"),
        classes=("T5Gemma2DecoderLayer",),
    ),
    Structure(
        "bart, plbart, marian, blenderbot-small, mvp, trocr",
        FC + CROSS,
        fc("post"),
        classes=(*layers("Bart", "PLBart", "Marian", "BlenderbotSmall", "Mvp", "TrOCR"), "LEDDecoderLayer"),
        scales=("dropout", "activation_dropout"),
    ),
    Structure(
        "mbart, whisper, pegasus, m2m100, blenderbot, speech-to-text, biogpt, xglm, musicgen, the decoder of "
        "bigbird-pegasus",
        FC + CROSS,
        fc("pre"),
        classes=(
            *layers("MBart", "Whisper", "Pegasus", "M2M100", "Blenderbot", "Speech2Text"),
            *(f"{name}DecoderLayer" for name in _DECODERS),
            *(f"{name}EncoderLayer" for name in _WHISPER),
            "MossTranscribeDiarizeAudioLayer",
        ),
        scales=("dropout", "activation_dropout"),
    ),
    Structure(
        "switch-transformers",
        "layer",
        BlockSites(
            "pre", "layer.0.SelfAttention", "layer.0.dropout", "layer.-1.mlp", "layer.-1.dropout",
            input_norm="layer.0.layer_norm",
        ),
    ),
    Structure(
        "the decoder of pix2struct",
        "self_attention encoder_decoder_attention mlp",
        pre("self_attention.attention", "mlp.DenseReluDense", "self_attention.layer_norm",
            attention_output="self_attention.dropout", ffn_output="mlp.dropout"),
        classes=("Pix2StructTextBlock",),
    ),
    Structure(
        "nllb-moe: one dropout module serves both attentions",
        "self_attn attn_dropout self_attn_layer_norm ffn ff_layer_norm ff_dropout [activation_fn] [cross_attention] "
        "[cross_attention_layer_norm]",
        pre("self_attn", "ffn", "self_attn_layer_norm", ffn_output="ff_dropout", ffn_norm="ff_layer_norm"),
        scales=("dropout",),
    ),
    Structure(
        "seamless-m4t: one dropout module serves both attentions",
        "self_attn attn_dropout self_attn_layer_norm ffn ffn_layer_norm ffn_dropout [activation_fn] [cross_attention] "
        "[cross_attention_layer_norm]",
        pre("self_attn", "ffn", "self_attn_layer_norm", ffn_output="ffn_dropout", ffn_norm="ffn_layer_norm"),
        scales=("dropout",),
    ),
    Structure(
        "the decoder of canary, cohere-asr, moonshine",
        "self_attn encoder_attn mlp input_layernorm post_attention_layernorm final_layernorm",
        pre("self_attn", "mlp", "input_layernorm", ffn_norm="final_layernorm"),
        classes=("CanaryDecoderLayer", "CohereAsrDecoderLayer", "MoonshineDecoderLayer"),
    ),
    Structure("the encoder of dia", "pre_sa_norm self_attention post_sa_norm mlp",
              pre("self_attention", "mlp", "pre_sa_norm")),
    Structure(
        "the decoder of dia",
        "self_attention cross_attention pre_sa_norm pre_ca_norm pre_mlp_norm mlp",
        pre("self_attention", "mlp", "pre_sa_norm", ffn_norm="pre_mlp_norm"),
    ),
    Structure(
        "the encoder of led: the mask also tells which tokens attend globally",
        FC,
        replace(fc("post"), mask="signed"),
        classes=("LEDEncoderLayer",),
        scales=("dropout", "activation_dropout"),
    ),
    Structure(
        "the encoder of fsmt",
        FC,
        replace(fc("post"), mask="hidden", layout="tokens_first"),
        classes=("modeling_fsmt.EncoderLayer",),
        scales=("dropout", "activation_dropout"),
    ),
    Structure(
        "the decoder of fsmt: its cache is a part of the state of a layer",
        FC + CROSS,
        replace(fc("post"), mixing="other", layout="tokens_first"),
        classes=("modeling_fsmt.DecoderLayer",),
        scales=("dropout", "activation_dropout"),
    ),
)  # fmt: skip
