"""CA-MTL in PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.config import TaskPeftConfig
from pal_adapters.hosts.peft.network import NetworkTuner, NetworkTunerLayer
from pal_adapters.hosts.peft.tuner import register

from .config import METHOD, preset_values, task_list, validate
from .options import CAMTLOptions


@dataclass
class CAMTLPeftConfig(CAMTLOptions, TaskPeftConfig):
    r"""One conditional network for all tasks: `get_peft_model(model, CAMTLPeftConfig(tasks=["rte", "mrpc"]))`.

    A learned vector a task steers the model by feature-wise linear modulation, see
    `pal_adapters.methods.camtl.film.FiLM`: the
    embeddings are aligned, a block-diagonal term is added to the attention scores of every block, the norms of the
    upper half become conditional and a linear bottleneck stands at the top (`ca_mtl_base`), or one behind every block
    on a side stream (`ca_mtl_large`). Half of the pretrained weights train with it, as copies of the adapter's own.

    Rows are routed by `task_ids`, names or numbers, given to the model's forward.

    Source: Pilault, El hattami and Pal, "Conditionally Adaptive Multi-Task Learning", ICLR 2021. Differs from the
    released code in: the top block keeps its pretrained weights, all conditional modules train, the lower half and the
    embeddings are frozen by default, `max_length` need not divide the width, and FiLM starts at zero unless
    `init_weights=False`. `CAMTLPeftConfig.preset("ca_mtl_base_code", tasks=[...])` has the released switches.

    Takes all options of `pal_adapters.methods.camtl.options.CAMTLOptions`, and beside them:

    Args:
        init_weights: True for FiLM that changes nothing at start (a bottleneck always does), False for the authors'
            `N(0, 0.02^2)`.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = METHOD
    copies_base: ClassVar[bool] = True

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
