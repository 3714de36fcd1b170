"""CA-MTL in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError
from ..hosts.adapters import register
from ..hosts.adapters_config import TaskAdapterConfig
from ..hosts.methods import Method
from .config import METHOD, PRESETS, preset_values, task_list, validate


@dataclass(eq=False)
class CAMTLConfig(TaskAdapterConfig):
    r"""One conditional network for all tasks: `model.add_adapter("all", config=CAMTLConfig(tasks=["rte", "mrpc"]))`.

    A learned vector a task steers the model by feature-wise linear modulation, see `pal_adapters.camtl.film.FiLM`: the
    embeddings are aligned, a block-diagonal term is added to the attention scores of every block, the norms of the
    upper half become conditional and a linear bottleneck stands at the top (`ca_mtl_base`), or one behind every block
    on a side stream (`ca_mtl_large`). Half of the pretrained weights train with it, as copies of the adapter's own.

    Rows are routed by `task_ids`, names or numbers, given to the model's forward.

    Source: Pilault, El hattami and Pal, "Conditionally Adaptive Multi-Task Learning", ICLR 2021. Differs from the
    released code in: the top block keeps its pretrained weights, all conditional modules train, the lower half and the
    embeddings are frozen by default, `max_length` need not divide the width, and FiLM starts at zero unless
    `init_weights="bert"`. `CAMTLConfig.preset("ca_mtl_base_code", tasks=[...])` has the released switches. By string:
    `"ca_mtl_large[tasks=8]"`.

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
        init_weights: `"zero_film"` for FiLM that changes nothing at start (a bottleneck always does) or `"bert"`
            (`N(0, 0.02^2)`, the authors').

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD
    init_choices: ClassVar[tuple[str, ...]] = ("zero_film", "bert")
    fusable: ClassVar[bool] = False
    copies_base: ClassVar[bool] = True

    architecture: str | None = "ca_mtl"
    tasks: list[str] | int | None = None
    max_length: int = 128
    alignment: bool = True
    attention_layers: list[int] | None = None
    attention_modulation: str = "columns"
    norm_layers: list[int] | None = None
    norm_modulate_bias: bool = False
    bottleneck: str = "top"
    bottleneck_size: int | None = None
    train_base: bool = True
    freeze_layers: list[int] | None = None
    freeze_embeddings: bool = True
    freeze_rule: str = "intended"
    top_block_init: str = "pretrained"
    init_weights: str = "zero_film"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.__dict__["tasks"] = task_list(self.tasks)
        validate(self)
        if self.leave_out:
            raise ConfigError(
                f"leave_out={self.leave_out!r} is not allowed: the network is in all blocks; say which get which "
                "module by attention_layers and norm_layers."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CAMTLConfig:
        """A config by name: `"ca_mtl_base"`, `"ca_mtl_large"` or one of them with `"_code"` behind.

        Args:
            name: the preset.
            changes: fields to set beside, `tasks` at least.
        """
        return cls(**{**preset_values(name, ("init_weights", "bert")), **changes})


register(CAMTLConfig, {name: CAMTLConfig.preset(name) for name in PRESETS})
