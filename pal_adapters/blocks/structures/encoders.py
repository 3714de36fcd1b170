"""Encoders of text."""

from __future__ import annotations

from ..block_sites import BlockSites, Structure
from .shapes import pre

ENCODERS: tuple[Structure, ...] = (
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
        "rembert, big-bird",
        "attention intermediate output [crossattention]",
        BlockSites("post", "attention", "attention.output.dropout", "intermediate", "output.dropout", output="output"),
        inner="attention.output.LayerNorm output.LayerNorm",
    ),
    Structure(
        "ibert, not quantized",
        "attention intermediate output pre_intermediate_act pre_output_act",
        BlockSites("post", "attention", "attention.output.dropout", "intermediate", "output.dropout", output="output"),
        inner="attention.output.LayerNorm output.LayerNorm",
        flags={"quant_mode": False},
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
        "megatron-bert",
        "attention ln intermediate output [crossattention]",
        pre("attention.self", "intermediate", "attention.ln", attention_output="attention.output.dropout",
            ffn_output="output.dropout", ffn_norm="ln"),
    ),
    Structure(
        "lilt: a second, narrow stream for the layout",
        "attention intermediate output layout_intermediate layout_output",
        BlockSites(
            "post", "attention", "attention.output.dropout", "intermediate", "output.dropout", output="output",
            layout="streams",
        ),
        inner="attention.output.LayerNorm output.LayerNorm",
    ),
    Structure(
        "tvp",
        "attention intermediate output",
        BlockSites("post", "attention", "attention.dropout", "intermediate", "output.dropout", output="output"),
        inner="attention.layer_norm output.layer_norm",
        classes=("TvpEncodeLayer",),
    ),
    Structure(
        "the query transformer of blip-2, without text",
        "attention [crossattention] intermediate_query output_query",
        BlockSites(
            "post", "attention", "attention.output.dropout", "intermediate_query", "output_query.dropout",
            output="output_query",
        ),
        classes=("Blip2QFormerLayer",),
    ),
    Structure(
        "longformer: the mask also tells which tokens attend globally",
        "attention intermediate output",
        BlockSites(
            "post", "attention", "attention.output.dropout", "intermediate", "output.dropout", output="output",
            mask="signed",
        ),
        inner="attention.output.LayerNorm output.LayerNorm",
        classes=("LongformerLayer",),
    ),
    Structure(
        "canine, mra: attention within parts of the text, which no mask shows",
        "attention intermediate output",
        BlockSites(
            "post", "attention", "attention.output.dropout", "intermediate", "output.dropout", output="output",
            mixing="local",
        ),
        inner="attention.output.LayerNorm output.LayerNorm",
        classes=("CanineLayer", "MraLayer"),
    ),
    Structure(
        "fnet: a Fourier transform in the place of attention",
        "fourier intermediate output",
        BlockSites("post", "fourier", "fourier.self", "intermediate", "output.dropout", output="output"),
        inner="fourier.output.LayerNorm output.LayerNorm",
    ),
    Structure(
        "esmc: scales both branches",
        "input_layernorm self_attn post_attention_layernorm mlp",
        pre("self_attn", "mlp", "input_layernorm", residual=""),
        classes=("EsmcLayer",),
        scales=("scaling_factor",),
    ),
    Structure(
        "neomme: scales both branches; attention reads a mixture with the input of the first block",
        "input_layernorm self_attn post_attention_layernorm mlp",
        pre("self_attn", "mlp", "input_layernorm", residual=""),
        classes=("NeoMMEEncoderLayer",),
        scales=("residual_multiplier", "lambdas"),
    ),
    Structure(
        "squeezebert",
        "attention post_attention intermediate output",
        BlockSites(
            "post", "attention", "post_attention.dropout", "intermediate", "output.dropout", output="output",
            layout="channels_first",
        ),
        classes=("SqueezeBertModule",),
    ),
    Structure(
        "funnel: some blocks pool their queries",
        "attention ffn",
        BlockSites(
            "post", "attention", "attention.hidden_dropout", "ffn", "ffn.dropout", output="ffn.layer_norm",
            mixing="local",
        ),
        classes=("FunnelLayer",),
    ),
)  # fmt: skip
