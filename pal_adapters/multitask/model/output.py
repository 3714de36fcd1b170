"""What a `TaskHeads` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class TaskHeadsOutput(ModelOutput):
    """The output of `TaskHeads`.

    Args:
        loss: The loss of the batch, if labels were passed.
        logits: For each task in the batch, the logits of its examples in their order; see `HeadConfig`.
        task_losses: Summed loss of each task `[t]`, 0 for a task that is absent.
        task_counts: Number of items in each sum `[t]`: examples, or tokens that count.
    """

    loss: Tensor | None = None
    logits: dict[str, Tensor] | None = None
    task_losses: Tensor | None = None
    task_counts: Tensor | None = None
