"""Which rows of a batch `MultiTaskTrainer` trains on: what a selector is, and the one of CA-MTL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from pal_adapters.checks import require_one_of
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.model.heads import Kind
from pal_adapters.multitask.tasks.collate import Batch
from pal_adapters.multitask.tasks.task import Task

from .uncertainty import Regression, Score, select_uncertain

_KINDS: tuple[Kind, ...] = ("single_label", "multiple_choice", "regression")


@dataclass
class Candidates:
    """Rows that a `BatchSelector` may choose from.

    Args:
        tasks: Names of all tasks.
        task_ids: For each of the `b` rows the number of its task `[b]`.
        logits: For each task in the batch the logits of its rows, in their order; see `HeadConfig`.
        rows: For each task the numbers of its rows among the `b`.
        num_select: How many to choose.
        batch: The collated batch itself.
    """

    tasks: tuple[str, ...]
    task_ids: list[int]
    logits: dict[str, Tensor]
    rows: dict[str, list[int]]
    num_select: int
    batch: Batch


class BatchSelector(Protocol):
    """Chooses the rows to train on, such as the least certain ones of CA-MTL."""

    def select(self, candidates: Candidates) -> Sequence[int] | Tensor:
        """Numbers of the rows to keep, each from 0 to `b - 1`."""
        ...


@dataclass
class UncertaintySelector:
    """Keeps the rows about which the model is least certain, see `uncertainty.uncertainty`.

    Source: Pilault et al., "Conditionally Adaptive Multi-Task Learning", ICLR 2021.

    Args:
        score: `"code"` or `"paper"`, which compare tasks differently.
        regression: What the rows of a regression, which has no entropy, are scored by: see `uncertainty.uncertainty`.
        mode: `"train"` scores with dropout, as the released code does; `"eval"` without.
    """

    score: Score = "code"
    regression: Regression | None = None
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        require_one_of("score", self.score, ("code", "paper"))
        require_one_of("mode", self.mode, ("train", "eval"))

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise `ConfigError` for a task whose rows have no entropy: neither one class each, nor a number."""
        for task in tasks:
            if task.kind not in _KINDS:
                raise ConfigError(
                    f"task {task.name!r} is {task.kind}, and UncertaintySelector takes {', '.join(_KINDS)}: "
                    "use another sampling, or a batch_selector of your own."
                )

    def select(self, candidates: Candidates) -> list[int]:
        """Numbers of the rows to train on."""
        logits: dict[str, Tensor] = {
            task: rows.unsqueeze(-1) if rows.dim() == 1 else rows for task, rows in candidates.logits.items()
        }
        chosen = select_uncertain(logits, candidates.num_select, score=self.score, regression=self.regression)
        return [candidates.rows[task][row] for task, rows in chosen.rows.items() for row in rows]
