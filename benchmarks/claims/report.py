"""From the runs of a claim to its line: the difference, the verdict, and what would decide it.

A task that neither recipe learns, where no mean score is three standard errors above that of ignoring the input, says
nothing about a claim: it is reported, but is no part of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats

from .plans import Group, Line
from .runs import Runs
from .verdict import Difference, difference, learned, score


def report(line: Line, runs: Runs) -> dict[str, Any]:
    """All that the table, the JSON and the pictures need of a line."""
    found: dict[str, Any] = {
        "name": line.name, "says": line.says, "paper": line.paper, "least": line.least, "cells": [],
    }  # fmt: skip
    pairs = []
    for task, left, right in line.cells():
        both = [runs.seeds(group, runs.args.seeds) for group in (left, right)]
        found["cells"].append(cell(task, left, right, both, runs))
        pairs.append([[result["tasks"][task] for result in results] for results in both])
    cells = found["cells"]
    there = [number for number, pair in enumerate(pairs) if all(pair)]
    useful = [number for number in there if any(cells[number]["learned"])]
    found["missing"] = [one["name"] for number, one in enumerate(cells) if number not in there]
    found["not_learned"] = [cells[number]["name"] for number in there if number not in useful]
    got = None
    if there:
        counted = useful or there
        seeds = min(len(results) for number in counted for results in pairs[number])
        got = difference([(pairs[n][0][:seeds], pairs[n][1][:seeds]) for n in counted])
    decided = got is not None and useful and not found["missing"]
    found |= {
        "difference": got and asdict(got),
        "verdict": got.verdict(line.least) if got is not None and decided else "cannot tell",
        "parameters": [_parameters(cells, side) for side in (0, 1)],
    }
    found["needs"] = needs(line, runs, got, bool(useful)) if found["verdict"] == "cannot tell" else ""
    return found


def cell(task: str, left: Group, right: Group, both: Sequence[list[Any]], runs: Runs) -> dict[str, Any]:
    """One task of a line: scores by seed, learning rates, parameters, examples and coefficients."""
    sides = []
    for group, results in zip((left, right), both, strict=True):
        tried = runs.tries(group)
        one: dict[str, Any] = {
            "recipe": group.recipe,
            "tasks": list(group.tasks),
            "tries": {str(rate): result["dev"] for rate, result in tried.items()},
            "learning_rate": runs.rate(group),
            "scores": [score(result["tasks"][task]) for result in results],
            "steps": [result["steps"] for result in results],
            "seconds": [result["seconds"] for result in results],
        }
        if results:
            counts = results[0]["parameters"]
            one |= {"trained": counts["trained"] / len(group.tasks), "of_base": counts["trained"] / counts["base"]}
            one |= {"trivial": 100 * results[0]["tasks"][task]["trivial"], "rows": results[0]["tasks"][task]["rows"]}
            one |= {name: results[0][name] for name in ("examples", "transfer", "versions") if name in results[0]}
        sides.append(one)
    name = task if left.shots is None else f"{task}, {left.shots} a class"
    good = [learned([result["tasks"][task] for result in results]) for results in both if results]
    return {"name": name, "task": task, "shots": left.shots, "sides": sides, "learned": good}


def _parameters(cells: Sequence[dict[str, Any]], side: int) -> float | None:
    """The mean number of parameters trained for a task, without heads."""
    found = [one["sides"][side]["trained"] for one in cells if "trained" in one["sides"][side]]
    return float(np.mean(found)) if found else None


def needs(line: Line, runs: Runs, got: Difference | None, useful: bool) -> str:
    """What it takes to decide a line; `useful` says whether any recipe learned any of its tasks."""
    planned = {
        str(runs.pieces.path(settings)): settings
        for _, *pair in line.cells()
        for group in pair
        for settings in runs.planned(group)
    }
    done = [found for settings in planned.values() if (found := runs.pieces.find(settings)) is not None]
    if len(done) < len(planned):
        text = f"{len(done)} of {len(planned)} pieces are done"
        if done:
            each = float(np.mean([result["seconds"] for result in done]))
            left = each * (len(planned) - len(done)) / 3600
            text += f", {each:.0f} s each; the rest takes about {left:.1f} h on this machine"
        return text
    assert got is not None
    if not useful:
        return "no recipe learned any of the tasks: longer runs or another base model"
    if got.spread is None:
        return "one seed gives no interval: more --seeds"
    gap = abs(got.mean - line.least)
    if 1.96 * got.examples >= gap:
        return (
            f"the scored examples alone give an error of {1.96 * got.examples:.1f} points, and the difference is "
            f"{gap:.1f} from the limit: more tasks or larger validation sets"
        )
    room = math.sqrt(gap**2 - (1.96 * got.examples) ** 2)
    enough = next(n for n in range(2, 10**6) if stats.t.ppf(0.975, n - 1) * got.spread / math.sqrt(n) <= room)
    return f"about {enough} seeds, if difference and spread stay as they are"
