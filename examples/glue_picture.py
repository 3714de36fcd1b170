"""The figure of `glue.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pal_adapters.cli.shared import first_line
from pal_adapters.errors import ConfigError


def label(config: dict[str, Any]) -> str:
    """The recipe and the options that differ from it."""
    given = [config["sampling"]] if config["sampling"] else []
    if config["adam_bias_correction"] is not None:
        given.append("bias corrected" if config["adam_bias_correction"] else "bias not corrected")
    return config["preset"] + (f" ({', '.join(given)})" if given else "")


def picture(results: dict[str, Any], others: Sequence[str], path: Path) -> None:
    """Plots the average score against trained parameters per task, for this run and others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    every = [results]
    for folder in others:
        try:
            every.append(json.loads((Path(folder) / "results.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--compare {folder}: cannot read its results.json ({first_line(error)})") from error
    points: dict[str, list[tuple[float, float]]] = {}
    for one in every:
        points.setdefault(label(one["config"]), []).append((one["parameters"]["trained_per_task"], one["average"]))
    figure, axes = pyplot.subplots(figsize=(8.4, 4.2), layout="constrained")
    for name, found in points.items():
        axes.plot(*zip(*found, strict=True), "o", label=name)
    axes.set(xscale="log", xlabel="trained parameters per task", ylabel="average score")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")  # covers no points there
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
