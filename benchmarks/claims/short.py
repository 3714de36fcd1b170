"""The same lines from the short runs in `docs/results/`, which kept the scores of each seed but no predictions.

Without predictions, the error from the scored examples comes from formulas for each recipe alone. It is too large,
because both recipes score the same examples, so these verdicts are careful ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .plans import Line
from .verdict import Difference, combined

# Validation examples of the tasks.
EXAMPLES = {"rte": 277, "mrpc": 408, "stsb": 1500, "cola": 1043, "sst2": 872, "qnli": 5463, "copa": 100}
Seeds = Mapping[int, float]  # scores between 0 and 1 by seed


def variance(task: str, metric: str, value: float) -> float:
    """Squared standard error of a score from the number of examples: binomial, or that of a correlation."""
    count = EXAMPLES[task]
    return value * (1 - value) / count if metric == "accuracy" else (1 - value**2) ** 2 / (count - 1)


def difference(cells: Sequence[tuple[str, str, Seeds, Seeds]]) -> Difference:
    """The difference over cells `(task, metric, scores of the left recipe, of the right one)`, in points."""
    seeds = sorted(set.intersection(*(set(left) & set(right) for _, _, left, right in cells)))
    by_seed = [100 * sum(left[seed] - right[seed] for _, _, left, right in cells) / len(cells) for seed in seeds]
    total = 0.0
    for task, metric, *sides in cells:
        for side in sides:
            total += variance(task, metric, sum(side[seed] for seed in seeds) / len(seeds))
    return combined(by_seed, 100 * math.sqrt(total) / len(cells))


def learned(task: str, metric: str, scores: Seeds, trivial: float) -> bool:
    """Whether the mean score is three standard errors above that of ignoring the input."""
    mean = sum(scores.values()) / len(scores)
    return mean - trivial > 3 * math.sqrt(variance(task, metric, mean))


# Which runs of `many_tasks.json` belong to a recipe: values of its config.
RUNS: dict[str, dict[str, Any]] = {
    "full": {"preset": "full_single"},
    "houlsby": {"preset": "houlsby"},
    "pals": {"preset": "pals", "sampling": None, "learning_rate": 1e-4},
    "pals_proportional": {"preset": "pals", "sampling": "proportional"},
    "ca_mtl": {"preset": "ca_mtl", "sampling": "proportional"},
    "ca_mtl_uncertainty": {"preset": "ca_mtl", "sampling": None},
}


def read(many: Sequence[Mapping[str, Any]], transfer: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By recipe and task: metric, scores by seed, trivial score and trained parameters."""
    found: dict[str, dict[str, Any]] = {}

    def add(recipe: str, task: str, seed: int, scores: Any, trivial: Any, metric: str, trained: float) -> None:
        new = {"metric": metric, "seeds": {}, "trivial": trivial[metric], "trained": trained}
        found.setdefault(recipe, {}).setdefault(task, new)["seeds"][seed] = scores[metric]

    for recipe, wanted in RUNS.items():
        for run in many:
            config = run["config"]
            if all(config[name] == value for name, value in wanted.items()):
                for task, scores in run["scores"].items():
                    trained = run["parameters"]["trained_per_task"]
                    add(recipe, task, config["seed"], scores, run["baseline"][task], next(iter(scores)), trained)
    for run in transfer:
        config, target = run["config"], run["target"]
        (split,) = target["metrics"]
        parts = (target["metrics"][split], target["baseline"][split], target["primary_metric"])
        task = config["target"].split("/")[-1]
        add(config["method"], task, config["seed"], *parts, target["parameters"]["transfer"])
    return found


def report(line: Line, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A line in the form of `report.report`."""
    cells, used, one_seed, not_learned = [], [], [], []
    for task, left, right in line.cells():
        sides = [found[group.recipe][task] for group in (left, right)]
        good = [learned(task, one["metric"], one["seeds"], one["trivial"]) for one in sides]
        cells.append(
            {
                "name": task, "task": task, "shots": None, "learned": good,
                "sides": [
                    {
                        "recipe": group.recipe, "trivial": 100 * one["trivial"], "trained": one["trained"],
                        "scores": [100 * one["seeds"][seed] for seed in sorted(one["seeds"])],
                    }
                    for group, one in zip((left, right), sides, strict=True)
                ],
            }
        )  # fmt: skip
        if not any(good):
            not_learned.append(task)
        else:
            used.append((task, sides[0]["metric"], sides[0]["seeds"], sides[1]["seeds"]))
    most = max((len(set(left) & set(right)) for _, _, left, right in used), default=0)
    one_seed = [cell[0] for cell in used if len(set(cell[2]) & set(cell[3])) < most]
    got = difference([cell for cell in used if cell[0] not in one_seed]) if used else None
    verdict = got.verdict(line.least) if got is not None else "cannot tell"
    needs = ""
    if verdict == "cannot tell":
        needs = "one seed" if got is not None and got.spread is None else "the interval contains the limit"
        needs = needs if got is not None else "no recipe learned any of the tasks"
    return {
        "name": line.name, "says": line.says, "paper": line.paper, "least": line.least, "cells": cells,
        "missing": [f"{task}, which has fewer seeds" for task in one_seed], "not_learned": not_learned,
        "difference": got and asdict(got), "verdict": verdict, "needs": needs,
        "parameters": [cells[0]["sides"][side]["trained"] for side in (0, 1)],
    }  # fmt: skip
