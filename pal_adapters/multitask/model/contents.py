"""What the folder of a `TaskHeads` holds, and under which names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .base import added_parameters, without_in_place
from .files import inside
from .heads import Head, HeadConfig
from .routes import Route
from .task_description import TaskDescription

HEADS, POOLER, OUTPUT, EMBEDDINGS, ADDED = "heads", "pooler", "output_layer", "embeddings", "added"
BASE_FOLDER = "base.model"
"""An adapter cannot have this name, because a module cannot."""


@dataclass
class Contents:
    """What a folder holds.

    Args:
        backbone: The model with its adapters.
        heads: The heads by name.
        routes: The route of each task.
        balance: See `TaskHeads`.
        base: The base model's own tensors, see `base_tensors`.
        base_trained: Whether the base model has been trained.
        output_trained: Whether the output layer of a language model has been trained.
        described: The descriptions of the tasks.
    """

    backbone: Any
    heads: nn.ModuleDict
    routes: dict[str, Route]
    balance: str
    base: dict[str, Tensor]
    base_trained: bool = False
    output_trained: bool = False
    described: dict[str, TaskDescription] = field(default_factory=dict)

    def head_configs(self) -> dict[str, HeadConfig]:
        """Configuration of each head."""
        return {name: head.config for name, head in self.heads.items() if isinstance(head, Head)}

    def task_heads(self) -> dict[str, HeadConfig]:
        """Configuration of the head of each task."""
        configs = self.head_configs()
        return {task: configs[route.head] for task, route in self.routes.items()}

    def pooler(self) -> dict[str, Tensor]:
        """The base model's own pooler, if a head reads it."""
        if all(config.pooling != "pooler" or config.reads_tokens for config in self.head_configs().values()):
            return {}
        return {name: tensor for name, tensor in self.own_base().items() if name.startswith("pooler.")}

    def own_base(self) -> dict[str, Tensor]:
        """The base model's own tensors, without those that an adapter trains in place and saves."""
        return without_in_place(self.backbone, self.base)

    def added(self) -> dict[str, nn.Parameter]:
        """Parameters of adapters: those that the host added to the base model, and those that train in place."""
        return added_parameters(self.backbone, self.own_base().values())


def base_folder(directory: Path) -> Path:
    """The folder of a trained base model. Earlier releases called it `base`, a name that an adapter may have too."""
    place = directory / BASE_FOLDER
    return inside(directory, BASE_FOLDER if place.is_dir() else "base")


def width_of(backbone: Any) -> int:
    """`d`, the width of the hidden states."""
    width = getattr(getattr(backbone, "config", None), "hidden_size", 0)
    return int(width or backbone.get_input_embeddings().weight.shape[1])
