"""The batch selector of CA-MTL for `MultiTaskTrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pal_adapters.errors import require_one_of

from .trainer import Candidates
from .uncertainty import Regression, Score, select_uncertain


@dataclass
class UncertaintySelector:
    """Keeps the rows about which the model is least certain, see `uncertainty.uncertainty`.

    Source: Pilault et al., "Conditionally Adaptive Multi-Task Learning", ICLR 2021.

    Args:
        score: `"code"` or `"paper"`, which compare tasks differently.
        regression: What the rows of a regression, which has no entropy, are scored by: see `uncertainty.uncertainty`.
    """

    score: Score = "code"
    regression: Regression | None = None

    def __post_init__(self) -> None:
        require_one_of("score", self.score, ("code", "paper"))

    def select(self, candidates: Candidates) -> list[int]:
        """Numbers of the rows to train on."""
        logits: dict[str, Tensor] = {
            task: rows.unsqueeze(-1) if rows.dim() == 1 else rows for task, rows in candidates.logits.items()
        }
        chosen = select_uncertain(logits, candidates.num_select, score=self.score, regression=self.regression)
        return [candidates.rows[task][row] for task, rows in chosen.rows.items() for row in rows]
