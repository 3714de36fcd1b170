"""Verdicts: the interval of a difference between two recipes against the least difference that a claim allows.

The difference `D` is the mean over cells (a task, with all or a few training examples) of the difference of their
scores, in points (percent). Its interval combines two independent errors: that of the seeds, by Student's t over the
differences of the seeds, and that of the scored examples, by a jackknife over groups of them.

    half = sqrt((t(n - 1) * s / sqrt(n)) ** 2 + (1.96 * e) ** 2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from pal_adapters.multitask.metrics.builtin import score_labels

GROUPS = 100
Scores = Mapping[str, Any]  # the entry of a task in a piece's result


@dataclass(frozen=True)
class Difference:
    """A difference in points.

    Args:
        mean: Its mean over the seeds.
        seeds: How many there are.
        spread: Standard deviation over the seeds; `None` for one seed.
        examples: Standard error from the scored examples.
        interval: 95 % interval; `None` for one seed.
    """

    mean: float
    seeds: int
    spread: float | None
    examples: float
    interval: tuple[float, float] | None

    def verdict(self, least: float) -> str:
        """Whether the claim that the difference is at least `least` holds."""
        if self.interval is None or self.interval[0] < least <= self.interval[1]:
            return "cannot tell"
        return "agrees" if self.interval[0] >= least else "disagrees"


def score(task: Scores, kept: np.ndarray | None = None) -> float:
    """The score in points, on all scored examples or those kept."""
    predictions, labels = np.asarray(task["predictions"]), np.asarray(task["labels"])
    if kept is not None:
        predictions, labels = predictions[kept], labels[kept]
    return 100 * score_labels("scored", [task["metric"]], predictions, labels)[task["metric"]]


def jackknife(left: Sequence[Scores], right: Sequence[Scores]) -> float:
    """Squared standard error of the mean difference of a cell, whose seeds all score the same examples."""
    count = len(left[0]["labels"])
    order = np.random.default_rng(0).permutation(count)
    groups = np.array_split(order, min(GROUPS, count))
    values = []
    for group in groups:
        kept = np.setdiff1d(order, group)
        values.append(np.mean([score(a, kept) - score(b, kept) for a, b in zip(left, right, strict=True)]))
    return (len(groups) - 1) / len(groups) * float(np.sum((np.asarray(values) - np.mean(values)) ** 2))


def difference(cells: Sequence[tuple[Sequence[Scores], Sequence[Scores]]]) -> Difference:
    """The difference between two recipes.

    Args:
        cells: For each cell, the scores of both recipes by seed; all cells with the same seeds.
    """
    by_seed = np.mean([[score(a) - score(b) for a, b in zip(*cell, strict=True)] for cell in cells], axis=0)
    examples = math.sqrt(sum(jackknife(*cell) for cell in cells)) / len(cells)
    return combined(by_seed, examples)


def combined(by_seed: Sequence[float], examples: float) -> Difference:
    """The difference of each seed, and the error from the scored examples, both in points."""
    mean, seeds = float(np.mean(by_seed)), len(by_seed)
    if seeds == 1:
        return Difference(mean, 1, None, examples, None)
    spread = float(np.std(by_seed, ddof=1))
    half = math.hypot(stats.t.ppf(0.975, seeds - 1) * spread / math.sqrt(seeds), 1.96 * examples)
    return Difference(mean, seeds, spread, examples, (mean - half, mean + half))


def learned(runs: Sequence[Scores]) -> bool:
    """Whether the mean score of a recipe is above the trivial one by three standard errors."""
    trivial = runs[0]["trivial"]
    if trivial is None:
        return True
    constant = [dict(run) | {"predictions": _constant(run)} for run in runs]
    above = float(np.mean([score(run) for run in runs])) - 100 * trivial
    return above > 3 * math.sqrt(jackknife(runs, constant))


def _constant(run: Scores) -> list[Any]:
    """The prediction that ignores the input; of the scored examples' labels, which leaves the error the same."""
    labels = np.asarray(run["labels"])
    value = labels.mean() if labels.dtype.kind == "f" else np.bincount(labels).argmax()
    return [value] * len(labels)
