"""The kinds of transformer block that are found without the user's help: data for `sites.py`.

A row fits a block whose direct children are *exactly* those that it lists. One more child, a parameter of the block
itself or a number that it multiplies with would mean that its sums are built in another way, and a module attached by
guess would be wrong without a sign of it; such a block is refused, and the user names its sites. The forward functions
of all blocks that a row fits in transformers 4.57 and 5 have been read; those that fit by name but compute something
else are in `REFUSED`, or told apart by the row's `classes` and `flags`. `REPEATED` lists the blocks that
a model runs at several depths.
"""

from __future__ import annotations

from typing import Literal

from .block_sites import BlockSites, Structure


def _layers(*prefixes: str, suffix: str = "") -> tuple[str, ...]:
    return tuple(f"{p}{part}Layer{suffix}" for p in prefixes for part in ("Encoder", "Decoder"))


def _fc(norm: Literal["pre", "post"]) -> BlockSites:
    # These drop out with a function behind `fc2`: the term goes behind that.
    parts = ("self_attn", "self_attn", "fc1", "fc2")
    if norm == "pre":
        return BlockSites("pre", *parts, residual="", input_norm="self_attn_layer_norm")
    return BlockSites("post", *parts, output="final_layer_norm", residual="final_layer_norm", residual_at="input")


_FC = "self_attn self_attn_layer_norm fc1 fc2 final_layer_norm [activation_fn] "
_CROSS = "[encoder_attn] [encoder_attn_layer_norm]"
_WAV2VEC2 = ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "SEW", "Data2VecAudio")

STRUCTURES: tuple[Structure, ...] = (
    Structure(
        "xmod, post-LN: a language adapter, with the same dropout module, stands between the residual sum and "
        "the norm",
        "attention intermediate output [crossattention]",
        BlockSites(
            "post", "attention", "attention.output.dropout", "intermediate", "output.dense",
            output="output.LayerNorm", residual="output",
        ),
        inner="attention.output.LayerNorm",
        flags={"pre_norm": False},
    ),
    Structure(
        "xmod, pre-LN",
        "attention intermediate output [crossattention]",
        BlockSites(
            "pre", "attention.self", "attention.output.dropout", "intermediate", "output.dense",
            residual="output", input_norm="attention.output.LayerNorm",
        ),
        flags={"pre_norm": True},
    ),
    Structure(
        "bert, roberta, xlm-roberta, camembert, electra, deberta, deberta-v2, bert-generation, roformer, ernie, "
        "rembert",
        "attention intermediate output [crossattention]",
        BlockSites("post", "attention", "attention.output.dropout", "intermediate", "output.dropout", output="output"),
        inner="attention.output.LayerNorm output.LayerNorm",
    ),
    Structure(
        "mpnet",
        "attention intermediate output",
        BlockSites("post", "attention", "attention.dropout", "intermediate", "output.dropout", output="output"),
        inner="attention.LayerNorm output.LayerNorm",
    ),
    Structure(
        "esm",
        "attention intermediate output LayerNorm [crossattention]",
        BlockSites(
            "pre", "attention.self", "attention.output.dropout", "intermediate", "output.dropout",
            input_norm="attention.LayerNorm",
        ),
    ),
    Structure(
        "roberta-prelayernorm",
        "attention intermediate output [crossattention]",
        BlockSites(
            "pre", "attention.self", "attention.output.dropout", "intermediate.dense", "output.dropout",
            input_norm="attention.LayerNorm",
        ),
        inner="intermediate.LayerNorm",
        classes=("RobertaPreLayerNormLayer",),
    ),
    Structure(
        "xlm-roberta-xl: no dropout behind the feed-forward part",
        "attention intermediate output LayerNorm [crossattention]",
        BlockSites(
            "pre", "attention.self", "attention.output.dropout", "intermediate", "output.dense",
            input_norm="attention.self_attn_layer_norm",
        ),
        classes=("XLMRobertaXLLayer",),
    ),
    Structure(
        "nomic-bert, gte, transformers 5",
        "self_attn post_attention_dropout post_attention_layernorm mlp post_mlp_dropout post_mlp_layernorm",
        BlockSites(
            "post", "self_attn", "post_attention_dropout", "mlp", "post_mlp_dropout", output="post_mlp_layernorm"
        ),
    ),
    Structure(
        "distilbert",
        "attention sa_layer_norm ffn output_layer_norm",
        BlockSites("post", "attention", "attention", "ffn", "ffn", output="output_layer_norm"),
    ),
    Structure(
        "albert",
        "attention ffn ffn_output full_layer_layer_norm dropout [activation]",
        BlockSites(
            "post", "attention", "attention.output_dropout", "ffn", "ffn_output", output="full_layer_layer_norm"
        ),
        inner="attention.LayerNorm",
    ),
    Structure(
        "modernbert, modernbert-decoder",
        "attn_norm attn mlp_norm mlp",
        BlockSites("pre", "attn", "attn", "mlp", "mlp", input_norm="attn_norm"),
    ),
    Structure(
        "t5, mt5, umt5",
        "layer",
        BlockSites(
            "pre", "layer.0.SelfAttention", "layer.0.dropout", "layer.-1.DenseReluDense", "layer.-1.dropout",
            input_norm="layer.0.layer_norm",
        ),
    ),
    Structure(
        "openai-gpt",
        "ln_1 attn ln_2 mlp",
        BlockSites("post", "attn", "attn", "mlp", "mlp", output="ln_2"),
        classes=("modeling_openai.Block",),
    ),
    Structure(
        "gpt2, gpt-bigcode, gpt-neo, imagegpt",
        "ln_1 attn ln_2 mlp [crossattention] [ln_cross_attn]",
        BlockSites("pre", "attn", "attn", "mlp", "mlp", input_norm="ln_1"),
    ),
    Structure(
        "gptj, codegen: both branches read the block's input",
        "ln_1 attn mlp",
        BlockSites("pre", "attn", "attn", "mlp", "mlp", input_norm="ln_1"),
    ),
    Structure(
        "gpt-neox, pythia",
        "input_layernorm attention post_attention_dropout post_attention_layernorm mlp post_mlp_dropout",
        BlockSites(
            "pre", "attention", "post_attention_dropout", "mlp", "post_mlp_dropout", input_norm="input_layernorm"
        ),
    ),
    Structure(
        "gemma2, gemma3: a norm stands behind each branch",
        "input_layernorm self_attn post_attention_layernorm pre_feedforward_layernorm mlp post_feedforward_layernorm",
        BlockSites(
            "pre", "self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm",
            input_norm="input_layernorm", ffn_norm="pre_feedforward_layernorm",
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
        "glm4, glm4v, glm-ocr: a norm stands behind each branch",
        "input_layernorm self_attn post_self_attn_layernorm post_attention_layernorm mlp post_mlp_layernorm",
        BlockSites(
            "pre", "self_attn", "post_self_attn_layernorm", "mlp", "post_mlp_layernorm",
            input_norm="input_layernorm", ffn_norm="post_attention_layernorm",
        ),
    ),
    Structure(
        "olmo2, olmo3, exaone4: a norm stands behind each branch and none in front",
        "self_attn post_attention_layernorm mlp post_feedforward_layernorm",
        BlockSites(
            "pre", "self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm",
            input_norm="", ffn_norm="",
        ),
    ),
    Structure(
        "granite: scales both branches",
        "input_layernorm self_attn post_attention_layernorm mlp",
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", residual="", input_norm="input_layernorm"),
        classes=("GraniteDecoderLayer", "GraniteSWADecoderLayer", "MiniCPM3DecoderLayer"),
        scales=("residual_multiplier", "residual_scale"),
    ),
    Structure(
        "granitemoe: scales both branches",
        "input_layernorm self_attn post_attention_layernorm block_sparse_moe",
        BlockSites(
            "pre", "self_attn", "self_attn", "block_sparse_moe", "block_sparse_moe",
            residual="", input_norm="input_layernorm",
        ),
        classes=("GraniteMoeDecoderLayer",),
        scales=("residual_multiplier",),
    ),
    Structure(
        "apertus",
        "attention_layernorm self_attn feedforward_layernorm mlp",
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", input_norm="attention_layernorm"),
    ),
    Structure(
        "vaultgemma",
        "input_layernorm self_attn pre_feedforward_layernorm mlp",
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", input_norm="input_layernorm"),
    ),
    Structure(
        "llama4: a mixture of experts returns the tokens of all examples in one dimension",
        "input_layernorm self_attn post_attention_layernorm feed_forward",
        BlockSites(
            "pre", "self_attn", "self_attn", "feed_forward", "feed_forward", residual="", input_norm="input_layernorm"
        ),
        classes=("Llama4TextDecoderLayer",),
    ),
    Structure(
        "llama, mistral, qwen2, qwen3, gemma, glm, olmo, starcoder2, smollm3, qwen2-moe, and mixtral in "
        "transformers 5",
        "input_layernorm self_attn post_attention_layernorm mlp",
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", input_norm="input_layernorm"),
    ),
    Structure(
        "mixtral, transformers 4.57",
        "input_layernorm self_attn post_attention_layernorm block_sparse_moe",
        BlockSites(
            "pre", "self_attn", "self_attn", "block_sparse_moe", "block_sparse_moe", input_norm="input_layernorm"
        ),
    ),
    Structure(
        "phi3, phi4",
        "input_layernorm self_attn post_attention_layernorm mlp resid_attn_dropout resid_mlp_dropout",
        BlockSites(
            "pre", "self_attn", "resid_attn_dropout", "mlp", "resid_mlp_dropout", input_norm="input_layernorm"
        ),
    ),
    Structure(
        "stablelm, persimmon, emu3: one dropout module may serve both branches",
        "input_layernorm self_attn [post_attention_layernorm] mlp dropout",
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", residual="", input_norm="input_layernorm"),
    ),
    Structure(
        "phi: one dropout module serves both branches",
        "input_layernorm self_attn mlp resid_dropout",
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", residual="", input_norm="input_layernorm"),
    ),
    Structure(
        "cohere, cohere2, cohere2-moe",
        "input_layernorm self_attn mlp",
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", input_norm="input_layernorm"),
        classes=("CohereDecoderLayer", "Cohere2DecoderLayer", "Cohere2MoeDecoderLayer"),
    ),
    Structure(
        "falcon, one norm or two in a row: drops out with a function",
        "self_attention mlp input_layernorm [post_attention_layernorm]",
        BlockSites(
            "pre", "self_attention", "self_attention", "mlp", "mlp", residual="", input_norm="input_layernorm"
        ),
        classes=("FalconDecoderLayer",),
        scales=("hidden_dropout",),
    ),
    Structure(
        "falcon, two norms side by side",
        "self_attention mlp ln_attn ln_mlp",
        BlockSites("pre", "self_attention", "self_attention", "mlp", "mlp", residual="", input_norm="ln_attn"),
        classes=("FalconDecoderLayer",),
        scales=("hidden_dropout",),
    ),
    Structure(
        "bloom: attention and feed-forward add the residual themselves",
        "input_layernorm self_attention post_attention_layernorm mlp",
        BlockSites(
            "pre", "self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h",
            residual="", input_norm="input_layernorm",
        ),
        classes=("BloomBlock",),
        scales=("hidden_dropout",),
    ),
    Structure(
        "vit, deit, videomae, yolos, audio-spectrogram-transformer, transformers 4.57",
        "layernorm_before attention layernorm_after intermediate output",
        BlockSites("pre", "attention", "attention", "intermediate", "output.dropout", input_norm="layernorm_before"),
    ),
    Structure(
        "vit, deit, audio-spectrogram-transformer, transformers 5: one dropout module serves both branches",
        "layernorm_before attention layernorm_after mlp dropout",
        BlockSites("pre", "attention", "attention", "mlp", "mlp", residual="", input_norm="layernorm_before"),
    ),
    Structure(
        "beit, data2vec-vision, transformers 4.57: scales both branches",
        "layernorm_before attention layernorm_after intermediate output drop_path",
        BlockSites(
            "pre", "attention", "attention", "intermediate", "output.dropout",
            residual="", input_norm="layernorm_before",
        ),
        classes=("BeitLayer", "Data2VecVisionLayer"),
        scales=("lambda_1", "lambda_2"),
    ),
    Structure(
        "pixio, transformers 5: drops out whole branches",
        "layernorm_before attention layernorm_after mlp dropout drop_path",
        BlockSites("pre", "attention", "attention", "mlp", "mlp", residual="", input_norm="layernorm_before"),
        classes=("PixioLayer",),
    ),
    Structure(
        "beit, transformers 5",
        "layernorm_before attention layernorm_after mlp dropout drop_path [relative_position_bias]",
        BlockSites("pre", "attention", "attention", "mlp", "mlp", residual="", input_norm="layernorm_before"),
        classes=("BeitLayer",),
        scales=("lambda_1", "lambda_2"),
    ),
    Structure(
        "dinov2, dinov3: scales both branches",
        "norm1 attention layer_scale1 drop_path norm2 mlp layer_scale2",
        BlockSites("pre", "attention", "layer_scale1", "mlp", "layer_scale2", residual="", input_norm="norm1"),
    ),
    Structure(
        "clip, siglip, blip, idefics vision",
        "layer_norm1 self_attn layer_norm2 mlp",
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", input_norm="layer_norm1"),
    ),
    Structure(
        "bart, plbart, marian, blenderbot-small, mvp, trocr",
        _FC + _CROSS,
        _fc("post"),
        classes=_layers("Bart", "PLBart", "Marian", "BlenderbotSmall", "Mvp", "TrOCR"),
        scales=("dropout", "activation_dropout"),
    ),
    Structure(
        "mbart, whisper, pegasus, m2m100, blenderbot, speech-to-text, biogpt, xglm, musicgen, the decoder of "
        "bigbird-pegasus",
        _FC + _CROSS,
        _fc("pre"),
        classes=_layers("MBart", "Whisper", "Pegasus", "M2M100", "Blenderbot", "Speech2Text")
        + tuple(f"{name}DecoderLayer" for name in ("BioGpt", "XGLM", "Musicgen", "BigBirdPegasus")),
        scales=("dropout", "activation_dropout"),
    ),
    Structure(
        "opt",
        _FC,
        _fc("pre"),
        classes=("OPTDecoderLayer",),
        flags={"do_layer_norm_before": True},
        scales=("dropout",),
    ),
    Structure(
        "opt, post-LN",
        _FC,
        _fc("post"),
        classes=("OPTDecoderLayer",),
        flags={"do_layer_norm_before": False},
        scales=("dropout",),
    ),
    Structure(
        "wav2vec2, hubert, wavlm, post-LN",
        "attention dropout layer_norm feed_forward final_layer_norm",
        BlockSites("post", "attention", "dropout", "feed_forward", "feed_forward", output="final_layer_norm"),
        classes=_layers(*_WAV2VEC2),
    ),
    Structure(
        "wav2vec2, hubert, wavlm, pre-LN",
        "attention dropout layer_norm feed_forward final_layer_norm",
        BlockSites("pre", "attention", "dropout", "feed_forward", "feed_forward", input_norm="layer_norm"),
        classes=_layers(*_WAV2VEC2, suffix="StableLayerNorm"),
    ),
)  # fmt: skip

_WINDOWS = "its attention works on windows of an image, so that the tokens of a block are no sequence"
_OTHER_SUMS = "its residual sums are not those of the models with equal module names"

# By class: why it is refused although a row above would fit.
REFUSED: dict[str, str] = {
    "SwinLayer": _WINDOWS,
    "Swinv2Layer": _WINDOWS,
    "Swin2SRLayer": _WINDOWS,
    "DonutSwinLayer": _WINDOWS,
    "MaskFormerSwinLayer": _WINDOWS,
    "ClapAudioLayer": _WINDOWS,
    "RfDetrDinov2Layer": _WINDOWS,
    "LongformerLayer": "its attention mask also tells which tokens attend globally",
    "BigBirdLayer": "its sparse attention gets no attention mask",
    "MptBlock": "its attention mask is True for the tokens that are hidden",
    "CanineLayer": "its attention is local and its masks have another form",
    "BridgeTowerResidualAttention": "its tokens come before the rows of the batch",
    "CLIPSegDecoderLayer": _OTHER_SUMS,
    "ChameleonSwinDecoderLayer": _OTHER_SUMS,
    "MiniMaxDecoderLayer": _OTHER_SUMS,
    "Molmo2DecoderLayer": _OTHER_SUMS,
    "BeamDecoderLayer": _OTHER_SUMS,
    "BailingHybridDecoderLayer": "some of its blocks have linear attention, which has no mask",
    "KimiLinearDecoderLayer": "some of its blocks have linear attention, which has no mask",
}

# By class: blocks that their model runs at several depths, although they stand in it once.
REPEATED: frozenset[str] = frozenset({"AlbertLayer"})
