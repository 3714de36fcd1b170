"""Encoders of speech and audio."""

from __future__ import annotations

from ..block_sites import BlockSites, Structure
from .shapes import layers, pre

_WAV2VEC2 = ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "SEW", "Data2VecAudio")
_FASTSPEECH = (
    "self_attn feed_forward feed_forward_macaron ff_macaron_layer_norm conv_module conv_layer_norm final_layer_norm "
    "ff_layer_norm self_attn_layer_norm dropout"
)

AUDIO: tuple[Structure, ...] = (
    Structure(
        "wav2vec2, hubert, wavlm, post-LN",
        "attention dropout layer_norm feed_forward final_layer_norm",
        BlockSites("post", "attention", "dropout", "feed_forward", "feed_forward", output="final_layer_norm"),
        classes=(*layers(*_WAV2VEC2), "SpeechT5EncoderLayer"),
    ),
    Structure(
        "wav2vec2, hubert, wavlm, pre-LN",
        "attention dropout layer_norm feed_forward final_layer_norm",
        BlockSites("pre", "attention", "dropout", "feed_forward", "feed_forward", input_norm="layer_norm"),
        classes=layers(*_WAV2VEC2, suffix="StableLayerNorm"),
    ),
    Structure(
        "wav2vec2-bert, wav2vec2-conformer, seamless-m4t: attention between two half feed-forward parts",
        "ffn1_layer_norm ffn1 self_attn_layer_norm self_attn_dropout self_attn conv_module ffn2_layer_norm ffn2 "
        "final_layer_norm",
        pre("self_attn", "ffn2", "self_attn_layer_norm", attention_output="self_attn_dropout",
            residual="final_layer_norm", residual_at="input", ffn_norm="ffn2_layer_norm"),
    ),
    Structure(
        "parakeet, lasr, granite-speech5, nemotron-asr: attention between two half feed-forward parts",
        "feed_forward1 self_attn conv feed_forward2 norm_feed_forward1 norm_self_att norm_conv norm_feed_forward2 "
        "norm_out",
        pre("self_attn", "feed_forward2", "norm_self_att", residual="norm_out", residual_at="input",
            ffn_norm="norm_feed_forward2"),
    ),
    Structure(
        "omniasr: one dropout module serves both branches",
        "attention dropout layer_norm feed_forward final_layer_norm",
        pre("attention", "feed_forward", "layer_norm", residual=""),
        classes=("OmniASREncoderLayer",),
    ),
    Structure(
        "vits: one dropout module serves both branches",
        "attention dropout layer_norm feed_forward final_layer_norm",
        BlockSites(
            "post", "attention", "attention", "feed_forward", "feed_forward", output="final_layer_norm",
            residual="final_layer_norm", residual_at="input",
        ),
        classes=("VitsEncoderLayer",),
    ),
    Structure(
        "the decoder of speecht5: one dropout module serves both attentions",
        "self_attn dropout self_attn_layer_norm encoder_attn encoder_attn_layer_norm feed_forward final_layer_norm",
        BlockSites("post", "self_attn", "self_attn", "feed_forward", "feed_forward", output="final_layer_norm"),
        classes=("SpeechT5DecoderLayer",),
    ),
    Structure("the encoder of voxtral-realtime", "self_attn self_attn_layer_norm activation_fn final_layer_norm mlp",
              pre("self_attn", "mlp", "self_attn_layer_norm")),
    Structure(
        "mimi, pocket-tts: scale both branches",
        "self_attn mlp input_layernorm post_attention_layernorm self_attn_layer_scale mlp_layer_scale",
        pre("self_attn", "mlp", "input_layernorm", attention_output="self_attn_layer_scale",
            ffn_output="mlp_layer_scale"),
    ),
    Structure(
        "fastspeech2-conformer, pre-LN: one dropout module serves all branches",
        _FASTSPEECH,
        pre("self_attn", "feed_forward", "self_attn_layer_norm", residual="final_layer_norm", residual_at="input",
            ffn_norm="ff_layer_norm"),
        flags={"normalize_before": True, "concat_after": False},
        scales=("ff_scale",),
    ),
    Structure(
        "fastspeech2-conformer, post-LN",
        _FASTSPEECH,
        BlockSites(
            "post", "self_attn", "self_attn", "feed_forward", "feed_forward", output="final_layer_norm",
            residual="ff_layer_norm", residual_at="input",
        ),
        flags={"normalize_before": False, "concat_after": False},
        scales=("ff_scale",),
    ),
)  # fmt: skip
