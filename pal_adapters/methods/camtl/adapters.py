"""CA-MTL in `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.adapters.config import TaskAdapterConfig
from pal_adapters.hosts.adapters.registration import register

from .config import PRESETS, CAMTLOptions, preset_values, task_list


@dataclass(eq=False)
class CAMTLConfig(CAMTLOptions, TaskAdapterConfig):
    """One conditional network for all tasks: `model.add_adapter("all", config=CAMTLConfig(tasks=["rte", "mrpc"]))`, or
    by string, `"ca_mtl_large[tasks=8]"`.

    Its options are those of `pal_adapters.methods.camtl.config.CAMTLOptions`, and those of every config,
    `pal_adapters.hosts.adapters.config.TaskAdapterConfig`.

    Args:
        leave_out: not allowed: the network is in all blocks.
        init_weights: `"zero_film"` (FiLM starts as the identity; bottlenecks cannot) or `"bert"`
            (`N(0, 0.02^2)`, as the authors do).
    """

    init_choices: ClassVar[tuple[str, ...]] = ("zero_film", "bert")

    architecture: str | None = "ca_mtl"
    init_weights: str = "zero_film"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.__dict__["tasks"] = task_list(self.tasks)

    def validate(self) -> None:
        super().validate()
        if self.leave_out:
            raise ConfigError(
                f"leave_out={self.leave_out!r} is not allowed: the network is in all blocks. Select the blocks "
                "of its modules with attention_layers and norm_layers."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CAMTLConfig:
        """A preset: `"ca_mtl_base"` or `"ca_mtl_large"`, or as released, `"ca_mtl_base_code"` or
        `"ca_mtl_large_code"`.

        Args:
            name: the preset.
            changes: values of other fields, at least of `tasks`.
        """
        return cls(**{**preset_values(name, ("init_weights", "bert")), **changes})


register(CAMTLConfig, {name: CAMTLConfig.preset(name) for name in PRESETS})
