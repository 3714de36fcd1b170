"""Decoders of text."""

from __future__ import annotations

from ..block_sites import BlockSites, Structure
from .shapes import FC, fc, pre

_LLAMA = ("self_attn", "mlp", "input_layernorm")
_SANDWICH = (
    "input_layernorm self_attn post_attention_layernorm pre_feedforward_layernorm mlp post_feedforward_layernorm"
)
_SANDWICH_SITES = {
    "attention_output": "post_attention_layernorm",
    "ffn_output": "post_feedforward_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}

DECODERS: tuple[Structure, ...] = (
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
        classes=(
            "GraniteDecoderLayer", "GraniteSWADecoderLayer", "MiniCPM3DecoderLayer", "GraniteDoclingTextDecoderLayer",
        ),
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
        "opt",
        FC,
        fc("pre"),
        classes=("OPTDecoderLayer",),
        flags={"do_layer_norm_before": True},
        scales=("dropout",),
    ),
    Structure(
        "opt, post-LN",
        FC,
        fc("post"),
        classes=("OPTDecoderLayer",),
        flags={"do_layer_norm_before": False},
        scales=("dropout",),
    ),
    Structure(
        "higgs-audio-v2: text and audio have norms and feed-forward parts of their own, which get their tokens apart",
        "input_layernorm self_attn post_attention_layernorm mlp audio_mlp audio_input_layernorm "
        "audio_post_attention_layernorm",
        pre("self_attn", "self_attn", "", residual=""),
    ),
    Structure(
        "glm5-next: several residual streams, and a mask of the tokens of this call alone in all blocks",
        "input_layernorm self_attn post_attention_layernorm mlp attn_hc ffn_hc",
        pre(*_LLAMA, mixing="recurrent", layout="streams"),
        classes=("Glm5NextTextDecoderLayer",),
    ),
    Structure(
        "evolla: some blocks end with cross-attention to a protein, behind the feed-forward sum",
        "input_layernorm self_attn post_attention_layernorm mlp [adapter]",
        pre(*_LLAMA),
        classes=("EvollaDecoderLayer",),
    ),
    Structure("molmo2", "input_layernorm self_attn post_attention_layernorm mlp", pre(*_LLAMA),
              classes=("Molmo2DecoderLayer",), flags={"norm_after": False}),
    Structure(
        "molmo2, norms behind the branches",
        "input_layernorm self_attn post_attention_layernorm mlp",
        pre("self_attn", "mlp", "", attention_output="input_layernorm", ffn_output="post_attention_layernorm",
            ffn_norm=""),
        classes=("Molmo2DecoderLayer",), flags={"norm_after": True},
    ),
    Structure("jetmoe", "input_layernorm self_attention post_attention_layernorm mlp",
              pre("self_attention", "mlp", "input_layernorm"), classes=("JetMoeDecoderLayer",)),
    Structure(
        "doge: scales the residual stream",
        "input_layernorm self_attn post_attention_layernorm mlp",
        pre(*_LLAMA, residual=""),
        classes=("DogeDecoderLayer",),
        scales=("hidden_dropout", "input_residual", "post_attention_residual"),
    ),
    Structure(
        "afmoe",
        "input_layernorm self_attn post_attention_layernorm pre_mlp_layernorm mlp post_mlp_layernorm",
        pre(*_LLAMA, attention_output="post_attention_layernorm", ffn_output="post_mlp_layernorm",
            ffn_norm="pre_mlp_layernorm"),
    ),
    Structure("beam: scales the residual sums by depth", _SANDWICH, pre(*_LLAMA, **_SANDWICH_SITES, residual=""),
              classes=("BeamDecoderLayer",)),
    Structure(
        "muse-spark: gates weigh the residual sums",
        f"{_SANDWICH} post_attention_residual_gate post_feedforward_residual_gate",
        pre(*_LLAMA, **_SANDWICH_SITES, residual=""),
    ),
    Structure(
        "zaya: scales the residual sums",
        "input_layernorm self_attn post_attention_layernorm mlp post_attention_residual_scale post_mlp_residual_scale",
        pre(*_LLAMA, residual="", mask="mapping"),
    ),
    Structure(
        "gemma4, embedding-gemma2: the input of each layer joins behind the feed-forward part",
        f"{_SANDWICH} [act_fn] [ple_block] [per_layer_input_gate] [per_layer_projection] [post_per_layer_input_norm] "
        "[router] [experts] [post_feedforward_layernorm_1] [post_feedforward_layernorm_2] "
        "[pre_feedforward_layernorm_2]",
        pre(*_LLAMA, **_SANDWICH_SITES),
        classes=("Gemma4TextDecoderLayer", "Gemma4UnifiedTextDecoderLayer", "EmbeddingGemma2EncoderLayer"),
        scales=("layer_scalar",),
    ),
    Structure(
        "gemma3n: several predictions of the residual stream, of which a block updates one by its sum",
        f"{_SANDWICH} act_fn altup laurel per_layer_input_gate per_layer_projection post_per_layer_input_norm",
        pre(*_LLAMA, **_SANDWICH_SITES, layout="streams"),
    ),
    Structure(
        "hy-v4: several residual streams, among which a block's outputs are distributed",
        "input_layernorm self_attn post_attention_layernorm mlp attn_hc ffn_hc",
        pre(*_LLAMA, layout="streams"),
        classes=("HYV4DecoderLayer", "HYV4VLDecoderLayer"),
    ),
    Structure(
        "deepseek-v4: several residual streams, and a generation cache that compresses",
        "input_layernorm self_attn post_attention_layernorm mlp attn_hc ffn_hc",
        pre(*_LLAMA, mixing="other", layout="streams"),
        classes=("DeepseekV4DecoderLayer",),
    ),
    Structure(
        "hyperclovax: scales both branches",
        "input_layernorm self_attn post_attention_layernorm mlp post_norm1 post_norm2",
        pre(*_LLAMA, attention_output="post_norm1", ffn_output="post_norm2", residual="",
            ffn_norm="post_attention_layernorm"),
        scales=("residual_multiplier",),
    ),
    Structure(
        "granitemoeshared, granitemoe-swa, and attention in granitemoehybrid: scale both branches; the shared expert "
        "stands for the feed-forward part",
        "input_layernorm self_attn post_attention_layernorm [block_sparse_moe] shared_mlp",
        pre("self_attn", "shared_mlp", "input_layernorm", residual=""),
        scales=("residual_multiplier",),
    ),
    Structure(
        "longcat-flash: two attentions and two feed-forward parts",
        "mlp self_attn mlps input_layernorm post_attention_layernorm",
        pre("self_attn.0", "mlps.1", "input_layernorm.0", residual="", ffn_norm="post_attention_layernorm.1"),
        classes=("LongcatFlashDecoderLayer",),
    ),
    Structure("the text part of voxtral-realtime",
              "input_layernorm self_attn post_attention_layernorm mlp ada_rms_norm", pre(*_LLAMA)),
    Structure(
        "gpt-neox-japanese: drops out with a function",
        "input_layernorm attention post_attention_layernorm mlp",
        pre("attention", "mlp", "input_layernorm", residual=""),
        classes=("GPTNeoXJapaneseLayer",),
        scales=("hidden_dropout",),
    ),
    Structure(
        "ctrl",
        "multi_head_attention ffn layernorm1 layernorm2 dropout1 dropout2",
        pre("multi_head_attention", "ffn", "layernorm1", attention_output="dropout1", ffn_output="dropout2"),
    ),
    Structure(
        "mpt: the feed-forward part adds the residual itself",
        "norm_1 attn norm_2 ffn resid_attn_dropout",
        pre("attn", "ffn", "norm_1", attention_output="resid_attn_dropout", ffn_output="ffn.down_proj", residual="",
            mask="hidden"),
        scales=("dropout_rate",),
    ),
    Structure("the decoder of clvp", "input_layernorm attn post_attention_layernorm mlp",
              pre("attn", "mlp", "input_layernorm"), classes=("ClvpDecoderLayer",)),
    Structure("the encoder of clvp", "self_attn mlp input_rmsnorm post_attention_rmsnorm",
              pre("self_attn", "mlp", "input_rmsnorm")),
    Structure(
        "kosmos-2, kosmos-2.5: the text part",
        "self_attn self_attn_layer_norm ffn final_layer_norm [encoder_attn] [encoder_attn_layer_norm]",
        pre("self_attn", "ffn", "self_attn_layer_norm", ffn_norm="final_layer_norm"),
        classes=("Kosmos2TextBlock", "Kosmos2_5TextBlock"),
        scales=("dropout",),
    ),
    Structure(
        "inkling: a short convolution behind each branch",
        "input_layernorm self_attn post_attention_layernorm mlp attn_sconv mlp_sconv",
        pre(*_LLAMA, attention_output="attn_sconv", ffn_output="mlp_sconv"),
    ),
    Structure(
        "inkling2, sliding window: attention over earlier blocks chooses the inputs of the branches",
        "[attention_input] mlp_input self_attn mlp input_layernorm post_attention_layernorm "
        "post_attention_convolution post_mlp_convolution",
        pre(*_LLAMA, attention_output="post_attention_convolution", ffn_output="post_mlp_convolution"),
    ),
    Structure(
        "inkling2, full attention: queries, keys and values have inputs of their own, of which the first is read",
        "[attention_input] mlp_input self_attn mlp q_input_layernorm k_input_layernorm v_input_layernorm "
        "post_attention_layernorm post_attention_convolution post_mlp_convolution",
        pre("self_attn", "mlp", "q_input_layernorm", attention_output="post_attention_convolution",
            ffn_output="post_mlp_convolution", ffn_norm="post_attention_layernorm"),
    ),
    Structure(
        "timesfm: the feed-forward part adds the residual itself",
        "self_attn mlp input_layernorm",
        pre("self_attn", "mlp.gate_proj", "input_layernorm", ffn_output="mlp.down_proj", residual=""),
        classes=("TimesFmDecoderLayer",),
    ),
    Structure(
        "cpm-ant",
        "self_att ffn",
        pre("self_att.self_attention", "ffn.ffn", "self_att.layernorm_before_attention", residual="",
            ffn_norm="ffn.layernorm_before_ffn"),
        classes=("CpmAntTransformerBlock",),
    ),
)  # fmt: skip
