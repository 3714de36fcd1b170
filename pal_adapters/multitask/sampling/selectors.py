"""Selectors choose the examples of a batch that `MultiTaskTrainer` trains on: the most uncertain ones (CA-MTL)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from pal_adapters.checks import either, mapping_of, number, optional, require_one_of, string
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.model.heads import Kind
from pal_adapters.multitask.tasks.collate import Batch
from pal_adapters.multitask.tasks.task import Task

from .uncertainty import Regression, Score, select_uncertain

_KINDS: tuple[Kind, ...] = ("single_label", "multiple_choice", "regression")


@dataclass
class Candidates:
    """The examples that a `BatchSelector` may choose from.

    Args:
        tasks: Names of all tasks.
        task_ids: The task ID of each of the `b` examples `[b]`.
        logits: For each task in the batch the logits of its examples, in their order; see `HeadConfig`.
        rows: For each task the indices of its examples among the `b`.
        num_select: How many to choose.
        batch: The collated batch.
    """

    tasks: tuple[str, ...]
    task_ids: list[int]
    logits: dict[str, Tensor]
    rows: dict[str, list[int]]
    num_select: int
    batch: Batch


class BatchSelector(Protocol):
    """Chooses the examples to train on, such as the most uncertain ones (CA-MTL)."""

    def select(self, candidates: Candidates) -> Sequence[int] | Tensor:
        """Indices of the examples to keep, each from 0 to `b - 1`."""
        ...


@dataclass
class UncertaintySelector:
    """Keeps the examples about which the model is most uncertain, see `uncertainty.uncertainty`.

    Source: Pilault et al., "Conditionally Adaptive Multi-Task Learning", ICLR 2021.

    Args:
        score: `"code"` or `"paper"`, which compare tasks differently.
        regression: How regression examples, which have no entropy, are scored: see `uncertainty.uncertainty`.
        mode: `"train"` scores with dropout, as the released code does; `"eval"` without.
    """

    score: Score = "code"
    regression: Regression | None = None
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        require_one_of("score", self.score, ("code", "paper"))
        require_one_of("mode", self.mode, ("train", "eval"))
        optional(mapping_of(either(number(), string(empty=False)), "numbers or tasks"))("regression", self.regression)

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise `ConfigError` for a task whose examples cannot be scored: neither classification nor regression."""
        for task in tasks:
            if task.kind not in _KINDS:
                raise ConfigError(
                    f"task {task.name!r} is {task.kind}, but UncertaintySelector takes {', '.join(_KINDS)}: "
                    "use another sampling, or a custom batch_selector."
                )

    def select(self, candidates: Candidates) -> list[int]:
        """Indices of the examples to train on."""
        logits: dict[str, Tensor] = {
            task: rows.unsqueeze(-1) if rows.dim() == 1 else rows for task, rows in candidates.logits.items()
        }
        chosen = select_uncertain(logits, candidates.num_select, score=self.score, regression=self.regression)
        return [candidates.rows[task][row] for task, rows in chosen.rows.items() for row in rows]
