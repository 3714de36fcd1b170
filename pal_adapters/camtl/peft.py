"""CA-MTL in PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import ConfigError
from ..hosts.methods import Method
from ..hosts.peft import register
from ..hosts.peft_config import TaskPeftConfig
from ..hosts.peft_network import NetworkTuner, NetworkTunerLayer
from .config import METHOD, preset_values, task_list, validate


@dataclass
class CAMTLPeftConfig(TaskPeftConfig):
    r"""One conditional network for all tasks: `get_peft_model(model, CAMTLPeftConfig(tasks=["rte", "mrpc"]))`.

    A learned vector a task steers the model by feature-wise linear modulation, see `pal_adapters.camtl.film.FiLM`: the
    embeddings are aligned, a block-diagonal term is added to the attention scores of every block, the norms of the
    upper half become conditional and a linear bottleneck stands at the top (`ca_mtl_base`), or one behind every block
    on a side stream (`ca_mtl_large`). Half of the pretrained weights train with it, as copies of the adapter's own.

    Rows are routed by `task_ids`, names or numbers, given to the model's forward.

    Source: Pilault, El hattami and Pal, "Conditionally Adaptive Multi-Task Learning", ICLR 2021. Differs from the
    released code in: the top block keeps its pretrained weights, all conditional modules train, the lower half and the
    embeddings are frozen by default, `max_length` need not divide the width, and FiLM starts at zero unless
    `init_weights=False`. `CAMTLPeftConfig.preset("ca_mtl_base_code", tasks=[...])` has the released switches.

    Args:
        tasks: names of the tasks, or how many there are.
        max_length: `n_max`, the longest sequence; shorter ones use the leading part of the attention term.
        alignment: align the embeddings.
        attention_layers: blocks with the attention term, from 0; None for all.
        attention_modulation: `"columns"` (code) or `"matrix"` (the paper's notation), see
            `pal_adapters.camtl.attention.ConditionalAttentionBias`.
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
        init_weights: True for FiLM that changes nothing at start (a bottleneck always does), False for the authors'
            `N(0, 0.02^2)`.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD
    copies_base: ClassVar[bool] = True

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = task_list(self.tasks)
        validate(self)
        for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not allowed: the network is in all blocks; say which get "
                    "which module by attention_layers and norm_layers."
                )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CAMTLPeftConfig:
        """A config by name: `"ca_mtl_base"`, `"ca_mtl_large"` or one of them with `"_code"` behind.

        Args:
            name: the preset.
            changes: fields to set beside, `tasks` at least.
        """
        return cls(**{**preset_values(name, ("init_weights", False)), **changes})


class CAMTLTunerLayer(NetworkTunerLayer):
    """The part of CA-MTL in one block."""

    method = METHOD


class CAMTLModel(NetworkTuner):
    """The tuner of CA-MTL."""

    method = METHOD
    tuner_layer_cls = CAMTLTunerLayer


register(METHOD, CAMTLPeftConfig, CAMTLModel)
