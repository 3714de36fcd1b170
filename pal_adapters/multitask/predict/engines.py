"""What a `Predictor` runs: a model that computes the logits of mixed batches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pal_adapters.multitask.model.heads import HeadConfig
from pal_adapters.multitask.model.routing import batch_group, cache_argument
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.multitask.model.task_heads import TaskHeads


class Engine(Protocol):
    """A model with many tasks, behind one interface."""

    @property
    def model(self) -> nn.Module:
        """The model with its heads."""
        ...

    @property
    def backbone(self) -> Any:
        """The model of the host."""
        ...

    def heads(self) -> Mapping[str, HeadConfig]:
        """The configuration of the head of each task."""
        ...

    def described(self) -> Mapping[str, TaskDescription]:
        """The descriptions that were saved with the model."""
        ...

    def group(self, task: str) -> Hashable:
        """Equal for tasks whose examples may share a batch."""
        ...

    def cache_argument(self, task: str) -> str | None:
        """The name of the argument for a key/value cache; `None` if a pass cannot continue from one."""
        ...

    def logits(self, tasks: Sequence[str], inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The logits of each task in a batch, for its examples in order; see `HeadConfig`.

        Args:
            tasks: The task of each encoder input.
            inputs: Arguments of the model, each tensor `[r, ...]`.
        """
        ...


class TaskHeadsEngine:
    """`TaskHeads`: many tasks in one pass, wherever the host can mix their adapters."""

    def __init__(self, model: TaskHeads) -> None:
        self.model = model

    @property
    def backbone(self) -> Any:
        """The model of the host."""
        return self.model.backbone

    def heads(self) -> Mapping[str, HeadConfig]:
        """The configuration of the head of each task."""
        return {task: self.model.head(task).config for task in self.model.tasks}

    def described(self) -> Mapping[str, TaskDescription]:
        """The descriptions that were saved with the model."""
        return self.model.described

    def group(self, task: str) -> Hashable:
        """Equal for tasks whose examples may share a batch."""
        return batch_group(self.model.backbone, self.model.routes[task].adapter)

    def cache_argument(self, task: str) -> str | None:
        """The name of the argument for a key/value cache; `None` if a pass cannot continue from one."""
        return cache_argument(self.model.backbone, self.model.routes[task].adapter)

    def logits(self, tasks: Sequence[str], inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The logits of each task in a batch."""
        logits = self.model(task_ids=list(tasks), **inputs).logits
        assert logits is not None
        return logits


def device_of(engine: Engine) -> torch.device:
    """The device of a model."""
    return next(engine.backbone.parameters()).device
