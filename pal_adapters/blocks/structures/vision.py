"""Encoders of images and videos."""

from __future__ import annotations

from torch import nn

from ..block_sites import BlockSites, Structure
from .shapes import pre

_PACKED = (
    "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe", "Qwen2_5Omni", "Qwen3OmniMoe",
    "Qwen4Exp", "Glm4v", "Glm4vMoe", "Glm5Next", "GlmImage", "GlmOcr", "CohereCompass", "Exaone4_5_",
)  # fmt: skip
_DETR = ("RTDetrEncoderLayer", "RTDetrDecoderLayer", "RTDetrV2EncoderLayer", "RTDetrV2DecoderLayer",
         "MaskFormerDetrDecoderLayer")  # fmt: skip

VISION: tuple[Structure, ...] = (
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
        "qwen2-vl, qwen2.5-vl, qwen3-vl, glm4v and others: the patches of all images behind each other",
        "norm1 norm2 attn mlp",
        pre("attn", "mlp", "norm1", layout="packed"),
        classes=tuple(f"{name}VisionBlock" for name in _PACKED)
        + tuple(f"{name}VisionEncoderLayer" for name in ("Kimi_K25", "MuseGlimmer", "MuseSpark")),
    ),
    Structure("hunyuan-vl, hy-v4-vl, cosmos3-edge: the patches of all images behind each other",
              "layer_norm1 self_attn layer_norm2 mlp", pre("self_attn", "mlp", "layer_norm1", layout="packed"),
              classes=("HunYuanVLVisionBlock", "HYV4VLVisionBlock", "Cosmos3EdgeVisionEncoderLayer")),
    Structure("lfm3-vl: the patches of all images behind each other",
              "self_attn feed_forward operator_norm ffn_norm",
              pre("self_attn", "feed_forward", "operator_norm", layout="packed"), classes=("Lfm3VlVisionLayer",)),
    Structure("pixtral: the patches of all images behind each other", "attention_norm feed_forward attention ffn_norm",
              pre("attention", "feed_forward", "attention_norm", layout="packed")),
    Structure("aimv2", "attention ffn rms_norm1 rms_norm2", pre("attention", "ffn", "rms_norm1")),
    Structure(
        "internvl, qianfan-ocr: scale both branches",
        "attention mlp layernorm_before layernorm_after dropout [drop_path1] [drop_path2]",
        pre("attention", "mlp", "layernorm_before", residual=""),
        scales=("lambda_1", "lambda_2"),
    ),
    Structure(
        "inkling2, step3.7: scale both branches",
        "self_attn mlp layernorm_before layernorm_after",
        pre("self_attn", "mlp", "layernorm_before", residual=""),
        classes=("Inkling2VisionEncoderLayer", "Step3p7VisionEncoderLayer"),
        scales=("lambda_1", "lambda_2"),
    ),
    Structure("mgp-str: drops out whole branches", "norm1 attn drop_path norm2 mlp",
              pre("attn", "mlp", "norm1", residual=""), classes=("MgpstrLayer",)),
    Structure(
        "convnext, convnext-v2: a convolution in the place of attention",
        "dwconv layernorm pwconv1 act pwconv2 drop_path [grn]",
        pre("dwconv", "dwconv", "", ffn_output="drop_path", mixing="other", layout="channels_first"),
        classes=("ConvNextLayer", "ConvNextV2Layer"),
        scales=("layer_scale_parameter",),
    ),
    Structure(
        "dinov3-convnext: a convolution in the place of attention",
        "depthwise_conv layer_norm pointwise_conv1 activation_fn pointwise_conv2 drop_path",
        pre("depthwise_conv", "depthwise_conv", "", ffn_output="drop_path", mixing="other", layout="channels_first"),
        scales=("gamma",),
    ),
    Structure(
        "swiftformer: a convolution in the place of attention",
        "depth_wise_conv norm point_wise_conv1 act point_wise_conv2 drop_path",
        pre("depth_wise_conv", "depth_wise_conv", "", ffn_output="drop_path", mixing="other", layout="channels_first"),
        scales=("layer_scale",),
    ),
    Structure(
        "mobilenet-v2, blocks with a residual",
        "expand_1x1 conv_3x3 reduce_1x1",
        pre("expand_1x1", "expand_1x1", "", attention_output="reduce_1x1", ffn_output="reduce_1x1", mixing="other",
            layout="channels_first"),
        flags={"use_residual": True},
    ),
    Structure(
        "resnet, regnet, blocks that keep the size: an activation in the place of the last norm",
        "layer shortcut activation",
        BlockSites("post", "layer", "layer.-1", "layer", "layer.-1", output="activation", mixing="other",
                   layout="channels_first"),
        classes=("ResNetBasicLayer", "ResNetBottleNeckLayer", "RegNetXLayer", "RegNetYLayer"),
        flags={"shortcut": nn.Identity},
    ),
    Structure(
        "bit, blocks that keep the size",
        "norm1 conv1 norm2 conv2 norm3 conv3 drop_path",
        pre("conv1", "conv1", "norm1", attention_output="conv3", ffn_output="conv3", residual="", mixing="other",
            layout="channels_first"),
        classes=("BitPreActivationBottleneckLayer",),
    ),
    Structure(
        "levit: attention and feed-forward parts are blocks of their own",
        "module",
        pre("module", "module", "", residual="", mixing="other"),
        classes=("LevitResidualLayer",),
        scales=("drop_rate",),
    ),
    Structure(
        "poolformer: an average over neighbours in the place of attention",
        "pooling output before_norm after_norm drop_path",
        pre("pooling", "output", "before_norm", residual="", mixing="other", layout="channels_first"),
        scales=("layer_scale_1", "layer_scale_2"),
    ),
    Structure("pix2struct, kosmos-2.5", "attention mlp pre_mlp_layer_norm pre_attention_layer_norm",
              pre("attention", "mlp", "pre_attention_layer_norm")),
    Structure("vjepa2", "norm1 attention drop_path norm2 mlp", pre("attention", "mlp", "norm1", residual=""),
              classes=("VJEPA2Layer",), scales=("mlp_ratio",)),
    Structure(
        "sam, sam-hq, got-ocr2, pp-formulanet, sam2: windows of an image, whose tokens have two dimensions",
        "layer_norm1 attn layer_norm2 mlp",
        pre("attn", "mlp", "layer_norm1", residual="", mixing="local", layout="grid"),
        classes=("SamVisionLayer", "SamHQVisionLayer", "GotOcr2VisionLayer", "PPFormulaNetVisionLayer",
                 "UnlimitedOcrSamVisionLayer", "Sam2MultiScaleBlock"),
        flags={"query_stride": None},
    ),
    Structure(
        "sam3: windows of an image, whose tokens have two dimensions",
        "layer_norm1 rotary_emb attention layer_norm2 mlp dropout",
        pre("attention", "mlp", "layer_norm1", residual="", mixing="local", layout="grid"),
        classes=("Sam3ViTLayer",),
        scales=("position_ids",),
    ),
    Structure(
        "hiera: windows of an image",
        "layernorm_before attn layernorm_after mlp drop_path",
        pre("attn", "mlp", "layernorm_before", residual="", mixing="local"),
        classes=("HieraLayer",),
    ),
    Structure(
        "focalnet: a modulation of neighbours in the place of attention",
        "norm1 modulation drop_path norm2 mlp",
        pre("modulation", "mlp", "norm1", residual="", mixing="other"),
        flags={"use_post_layernorm": False},
        scales=("gamma_1", "gamma_2", "drop"),
    ),
    Structure(
        "rf-detr: windows of an image",
        "norm1 attention layer_scale1 drop_path norm2 mlp layer_scale2",
        pre("attention", "mlp", "norm1", attention_output="layer_scale1", ffn_output="layer_scale2", residual="",
            mixing="local", layout="grid"),
        classes=("RfDetrDinov2Layer",),
    ),
    Structure(
        "segformer: keys and values are of a coarser image, where a module that attends sees all patches",
        "layernorm_before attention drop_path layernorm_after mlp hidden_dropout",
        pre("attention", "mlp", "layernorm_before", residual=""),
        classes=("SegformerLayer",),
    ),
    Structure(
        "pvt, pvt-v2, glpn: keys and values are of a coarser image, where a module that attends sees all patches",
        "layer_norm_1 attention drop_path layer_norm_2 mlp",
        pre("attention", "mlp", "layer_norm_1", residual=""),
    ),
    Structure(
        "cvt: the feed-forward part adds the residual itself",
        "attention intermediate output drop_path layernorm_before layernorm_after",
        pre("attention", "intermediate", "layernorm_before", ffn_output="output.dropout", residual=""),
        classes=("CvtLayer",),
    ),
    Structure(
        "timesformer, attention over time and then over space: its modules get the tokens in several orders",
        "drop_path attention intermediate output layernorm_before layernorm_after temporal_layernorm "
        "temporal_attention temporal_dense",
        pre("temporal_attention", "intermediate", "temporal_layernorm", attention_output="temporal_dense",
            ffn_output="output", residual="", ffn_norm="layernorm_after", layout="streams"),
    ),
    Structure(
        "the encoder and decoder of rt-detr, rt-detr-v2, and the decoder of maskformer",
        "self_attn self_attn_layer_norm mlp final_layer_norm [encoder_attn] [encoder_attn_layer_norm]",
        BlockSites(
            "post", "self_attn", "self_attn", "mlp", "mlp", output="final_layer_norm", residual="final_layer_norm",
            residual_at="input",
        ),
        classes=_DETR,
        scales=("dropout",),
    ),
    Structure(
        "swin, transformers 5",
        "layernorm_before attention layernorm_after mlp dropout drop_path",
        pre("attention", "mlp", "layernorm_before", residual="", mixing="local"),
        classes=("SwinLayer",),
    ),
    Structure(
        "swin, donut-swin, maskformer-swin, clap",
        "layernorm_before attention drop_path layernorm_after intermediate output",
        pre("attention", "intermediate", "layernorm_before", ffn_output="output", residual="", mixing="local"),
        classes=("SwinLayer", "DonutSwinLayer", "MaskFormerSwinLayer", "ClapAudioLayer"),
    ),
    Structure(
        "swinv2, swin2sr: norms behind the branches",
        "layernorm_before attention drop_path layernorm_after intermediate output",
        pre("attention", "intermediate", "", attention_output="layernorm_before", ffn_output="layernorm_after",
            residual="", ffn_norm="", mixing="local"),
        classes=("Swinv2Layer", "Swin2SRLayer"),
    ),
)  # fmt: skip
