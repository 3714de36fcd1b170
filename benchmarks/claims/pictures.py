"""Pictures of a claim: scores against trained parameters, and heat maps of sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pal_adapters import plot_transfer
from pal_adapters.fusion.types import TransferTable

MARKERS = "osD^vPX*"


def recipes(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores by recipe and cell, and parameters, of the lines of a claim."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        for one in line["cells"]:
            for side in one["sides"]:
                if side["scores"]:
                    entry = found.setdefault(side["recipe"], {"cells": {}, "trained": side["trained"]})
                    entry["cells"][one["name"]] = side["scores"]
    return found


def front(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean score over the cells that all recipes have, with the standard deviation over seeds as error bars."""
    from matplotlib.figure import Figure

    found = recipes(lines)
    shared = set.intersection(*(set(one["cells"]) for one in found.values())) if found else set()
    if not shared:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for marker, (name, one) in zip(MARKERS, found.items(), strict=False):
        seeds = min(len(one["cells"][cell]) for cell in shared)
        values = np.mean([one["cells"][cell][:seeds] for cell in sorted(shared)], axis=0)
        error = values.std(ddof=1) if seeds > 1 else None
        label = f"{name} ({seeds} seed{'s' * (seeds > 1)})"
        axes.errorbar(one["trained"], values.mean(), yerr=error, fmt=marker, capsize=4, label=label)
    axes.set(xscale="log", xlabel="trained parameters per task", ylabel="mean score, points")
    axes.set_title(", ".join(sorted(shared)), fontsize="small")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)


def heat_maps(lines: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """One heat map for each combination with the first seed, with colours around the value before training."""
    made = []
    for line in lines:
        for one in line["cells"]:
            for side in one["sides"]:
                path = folder / f"{side['recipe']}_{one['task']}_{one['shots'] or 'all'}.png"
                if "transfer" in side and path not in made:
                    keys = ("sources", "places", "values", "measure", "start")
                    table = TransferTable(**{key: side["transfer"][key] for key in keys})
                    plot_transfer(table, path, title=f"{side['recipe']} for {one['name']}")
                    made.append(path)
    return made
