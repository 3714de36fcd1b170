"""CA-MTL in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.patches import register
from pal_adapters.hosts.method import Method

from .config import METHOD, PRESETS, preset_values, task_list, validate
from .options import CAMTLOptions


@dataclass(eq=False)
class CAMTLConfig(CAMTLOptions, TaskAdapterConfig):
    r"""One conditional network for all tasks: `model.add_adapter("all", config=CAMTLConfig(tasks=["rte", "mrpc"]))`.

    A learned vector a task steers the model by feature-wise linear modulation, see
    `pal_adapters.methods.camtl.film.FiLM`: the
    embeddings are aligned, a block-diagonal term is added to the attention scores of every block, the norms of the
    upper half become conditional and a linear bottleneck stands at the top (`ca_mtl_base`), or one behind every block
    on a side stream (`ca_mtl_large`). Half of the pretrained weights train with it, as copies of the adapter's own.

    Rows are routed by `task_ids`, names or numbers, given to the model's forward.

    Source: Pilault, El hattami and Pal, "Conditionally Adaptive Multi-Task Learning", ICLR 2021. Differs from the
    released code in: the top block keeps its pretrained weights, all conditional modules train, the lower half and the
    embeddings are frozen by default, `max_length` need not divide the width, and FiLM starts at zero unless
    `init_weights="bert"`. `CAMTLConfig.preset("ca_mtl_base_code", tasks=[...])` has the released switches. By string:
    `"ca_mtl_large[tasks=8]"`.

    Takes all options of `pal_adapters.methods.camtl.options.CAMTLOptions`, and beside them:

    Args:
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
