"""CA-MTL in PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.network import NetworkTuner
from pal_adapters.hosts.peft.registration import register

from .config import CAMTLOptions, preset_values, task_list


@dataclass
class CAMTLPeftConfig(CAMTLOptions, TaskPeftConfig):
    """One conditional network for all tasks: `get_peft_model(model, CAMTLPeftConfig(tasks=["rte", "mrpc"]))`.

    Its options are those of `pal_adapters.methods.camtl.config.CAMTLOptions`, and those of every config,
    `pal_adapters.hosts.peft.config.TaskPeftConfig`.

    Args:
        exclude_modules: not allowed, nor are `layers_to_transform` and `layers_pattern`: the network is in all blocks.
        init_weights: True (FiLM starts as the identity; bottlenecks cannot) or False
            (`N(0, 0.02^2)`, as the authors do).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = task_list(self.tasks)

    def validate(self) -> None:
        super().validate()
        for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not allowed: the network is in all blocks. Select the "
                    "blocks of its modules with attention_layers and norm_layers."
                )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CAMTLPeftConfig:
        """A preset: `"ca_mtl_base"` or `"ca_mtl_large"`, or as released, `"ca_mtl_base_code"` or
        `"ca_mtl_large_code"`.

        Args:
            name: the preset.
            changes: values of other fields, at least of `tasks`.
        """
        return cls(**{**preset_values(name, ("init_weights", False)), **changes})


register(CAMTLPeftConfig, base=NetworkTuner)
