"""Draws docs/images/sampling.png: the sampling shares of four GLUE tasks over the epochs, by strategy."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from pal_adapters.multitask import MultiTaskBatchSampler, Strategy, Temperature

SIZES = {
    "CoLA": 8551, "MRPC": 3668, "MNLI": 392702, "RTE": 2490, "STS-B": 5749, "SST-2": 67349, "QQP": 363849,
    "QNLI": 108436,
}  # fmt: skip
SHOWN = ("MNLI", "QNLI", "CoLA", "RTE")
STRATEGIES: dict[str, str | Strategy] = {
    "proportional": "proportional",
    "annealed": "annealed",
    "sqrt": "sqrt",
    "temperature 5": Temperature(5.0),
    "uniform": "uniform",
}


def draw(path: Path, epochs: int = 25) -> None:
    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(11, 3), layout="constrained", sharex=True)
    for axis, task in zip(axes, SHOWN, strict=True):
        place = list(SIZES).index(task)
        for name, strategy in STRATEGIES.items():
            sampler = MultiTaskBatchSampler(SIZES, 32, strategy=strategy, epochs=epochs, steps_per_epoch=1)
            shares = np.array([sampler.probabilities(epoch)[place] for epoch in range(epochs)])
            axis.plot(range(1, epochs + 1), shares, label=name)
        axis.set_title(f"{task} ({SIZES[task]:,} examples)", fontsize="medium")
        axis.set_xlabel("epoch")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of samples")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/sampling.png"))
