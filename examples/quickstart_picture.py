"""The figure of `quickstart.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TITLES = {
    "matthews": "Matthews corr.",
    "accuracy": "accuracy",
    "pearson": "Pearson corr.",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Plots the scores before and after, and the size of four PALs compared with four fine-tuned models."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ink, grey, accent, pale = "#22303c", "#b9c2cb", "#0f7b8a", "#e6eaee"
    names = list(results["tasks"])
    tasks = results["tasks"]
    style = {"font.size": 10.5, "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4.6), width_ratios=(1.65, 1), layout="constrained", facecolor="white"
        )
        for position, name in enumerate(names):
            metric = next(iter(tasks[name]["after"]))
            for shift, when, colour in ((-0.19, "before", grey), (0.19, "after", accent)):
                value = tasks[name][when][metric]
                left.bar(position + shift, max(value, 0), width=0.36, color=colour)
                left.annotate(
                    f"{value:.2f}",
                    (position + shift, max(value, 0)),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=10,
                )
        labels = [f"{name}\n{TITLES[next(iter(tasks[name]['after']))]}" for name in names]
        left.set_xticks(range(len(names)), labels)
        left.set_ylim(0, 1.12)
        left.set_yticks(np.arange(0, 1.01, 0.25))
        left.set_title("Test scores on unseen words", loc="left", fontweight="bold", pad=12)
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (grey, accent)]
        left.legend(
            handles, ["frozen model + head", "frozen model + PAL + head"], frameon=False, ncols=2, loc="upper left"
        )

        base = results["base_parameters"] / 1e6
        added = sum(tasks[name]["trainable"] for name in names) / 1e6
        whole = base * len(names)
        for i in range(len(names)):
            right.barh(1, base, left=base * i, height=0.5, color=pale, edgecolor="white", linewidth=2)
            right.text(base * (i + 0.5), 1, f"{base:.1f} M", ha="center", va="center")
        right.barh(0, base, height=0.5, color=pale, edgecolor="white", linewidth=2)
        right.text(base / 2, 0, f"{base:.1f} M", ha="center", va="center")
        right.barh(0, added, left=base, height=0.5, color=accent)
        right.text(
            base + added + 0.02 * whole,
            0,
            f"+ {added:.2f} M\n= {1 + added / base:.2f} × one model",
            ha="left",
            va="center",
            color=accent,
            fontweight="bold",
        )
        right.set_yticks([1, 0], [f"{len(names)} fine-tuned\nmodels", f"1 model,\n{len(names)} PALs"])
        right.set_xlim(0, whole * 1.02)
        right.set_ylim(-0.5, 1.5)
        right.set_xlabel("parameters (millions)")
        right.set_title("Size of four tasks", loc="left", fontweight="bold", pad=12)

        for axes in (left, right):
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(grey)
            axes.tick_params(length=0)
        left.set_axisbelow(True)
        left.grid(axis="y", color=pale)
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        figure.savefig(path, dpi=160)
        plt.close(figure)
