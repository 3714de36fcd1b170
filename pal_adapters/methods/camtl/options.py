"""The options of CA-MTL, the same in both hosts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class CAMTLOptions:
    """The options of `CAMTLConfig` and `CAMTLPeftConfig`.

    Args:
        tasks: names of the tasks, or how many there are.
        max_length: `n_max`, the longest sequence; shorter ones use the leading part of the attention term.
        alignment: align the embeddings.
        attention_layers: blocks with the attention term, from 0; None for all.
        attention_modulation: `"columns"` (code) or `"matrix"` (the paper's notation), see
            `pal_adapters.methods.camtl.attention.ConditionalAttentionBias`.
        norm_layers: blocks whose norms are conditional; None for the upper half.
        norm_modulate_bias: modulate the shift of the norms too, as in the paper.
        bottleneck: `"top"` (base), `"stream"` (large) or `"none"`.
        bottleneck_size: inner width; None for a third of the model's width.
        train_base: train copies of the pretrained weights that are not frozen.
        freeze_layers: blocks whose pretrained weights stay as they are; None for the advised ones, 0 to 4 of 12 with
            `bottleneck="top"` and 0 to 11 of 24 with `"stream"`.
        freeze_embeddings: whether those of the embeddings do.
        freeze_rule: `"intended"` trains all conditional modules; `"code"` leaves the FiLM of the attention term in
            frozen blocks as it starts.
        top_block_init: `"pretrained"`, or `"scratch"` for a fresh last block as in the released base network.
    """

    tasks: list[str] | int | None = field(default=None, metadata={"help": "Names of the tasks."})
    max_length: int = field(default=128, metadata={"help": "The longest sequence."})
    alignment: bool = field(default=True, metadata={"help": "Align the embeddings."})
    attention_layers: list[int] | None = field(default=None, metadata={"help": "Blocks with the attention term."})
    attention_modulation: str = field(default="columns", metadata={"help": "'columns' or 'matrix'."})
    norm_layers: list[int] | None = field(default=None, metadata={"help": "Blocks with conditional norms."})
    norm_modulate_bias: bool = field(default=False, metadata={"help": "Modulate the shift of the norms too."})
    bottleneck: str = field(default="top", metadata={"help": "'top', 'stream' or 'none'."})
    bottleneck_size: int | None = field(default=None, metadata={"help": "Inner width of the bottlenecks."})
    train_base: bool = field(default=True, metadata={"help": "Train copies of pretrained weights."})
    freeze_layers: list[int] | None = field(default=None, metadata={"help": "Blocks whose weights stay."})
    freeze_embeddings: bool = field(default=True, metadata={"help": "Whether the embeddings stay."})
    freeze_rule: str = field(default="intended", metadata={"help": "'intended' or 'code'."})
    top_block_init: str = field(default="pretrained", metadata={"help": "'pretrained' or 'scratch'."})
