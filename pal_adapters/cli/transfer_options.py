"""The options and recipes of `pal-adapters transfer`, and its printed summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import default_host

from .options import PositiveFloat, PositiveInt, Seed, fill_in, option

SCALEARN = ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp")
METHODS = (*SCALEARN, "fusion", "single", "average")
# For each preset and kind of training: epochs, learning rate, early-stopping patience in epochs.
# "paper": the scripts of ScaLearn's authors, for RoBERTa-base. "small": minutes on two cores, with MiniLM.
RECIPES: dict[str, dict[str, tuple[int, float, int | None]]] = {
    "paper": {"source": (30, 3e-4, 5), "fusion": (30, 5e-5, 5), "scalearn": (30, 6e-3, None)},
    "small": {"source": (6, 1e-3, 2), "fusion": (6, 5e-4, 2), "scalearn": (12, 6e-3, None)},
}
TRAIN_ROWS = {"paper": None, "small": 4000}


@dataclass
class TransferOptions:
    """The options of `transfer`. Those that depend on the preset are filled in from `RECIPES`."""

    target: str = option("name or folder of the target task; it may also be a source")
    method: str = option("how the sources are combined", choices=METHODS)
    output_dir: str = option("folder for the results", aliases=["--output"])
    sources: list[str] = option("names or folders of the source tasks (not for single)", [])
    data_dir: str | None = option("folder with the data of named tasks (default: from the Hub)", None)
    source_dir: str | None = option("folder for saving and loading source adapters (OUTPUT/sources)", None)
    host: Literal["adapters", "peft"] | None = option("library of the adapters (the first one installed)", None)
    model: str | None = option("name or folder of the base model (the MiniLM encoder that pip installs)", None)
    pooling: Literal["mean", "cls"] = option("how heads pool the tokens", "mean")
    preset: str = option("recipe; the options below change it", "paper", choices=tuple(RECIPES))
    reduction_factor: PositiveFloat = option("reduction factor of the sources' bottlenecks", 16.0)
    source_epochs: PositiveInt | None = option("epochs over a source's data (by preset)", None)
    source_learning_rate: PositiveFloat | None = option("learning rate of the sources (by preset)", None)
    epochs: PositiveInt | None = option("epochs over the target's data (by preset)", None)
    learning_rate: PositiveFloat | None = option("learning rate of the target stage (by preset)", None)
    train_rows: PositiveInt | None = option("maximum number of training examples per task (by preset)", None)
    max_steps: PositiveInt | None = option("maximum number of steps of each training run", None)
    select: Literal["loss", "metric"] = option("what selects the best epoch", "loss")
    batch_size: PositiveInt = option("batch size", 32)
    max_length: PositiveInt = option("maximum number of tokens; longer texts are truncated", 128)
    seed: Seed = option("seed of the target stage", 0)
    source_seed: Seed = option("seed of the sources, independent of --seed", 0)

    def __post_init__(self) -> None:
        if self.method == "single":
            for name in ("source_epochs", "source_learning_rate"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--{name} has no effect with --method single, which uses no sources; leave it out"
                    )
        elif not self.sources:
            raise ConfigError(f"--sources is needed with --method {self.method}")
        self.source_dir = self.source_dir or str(Path(self.output_dir) / "sources")
        recipe = RECIPES[self.preset]
        kind = "source" if self.method == "single" else "fusion" if self.method == "fusion" else "scalearn"
        epochs, learning_rate, self.patience = recipe[kind]
        source_epochs, source_learning_rate, self.source_patience = recipe["source"]
        fill_in(
            self,
            host=default_host(),
            train_rows=TRAIN_ROWS[self.preset],
            epochs=epochs,
            learning_rate=learning_rate,
            source_epochs=source_epochs,
            source_learning_rate=source_learning_rate,
        )


def summary(results: dict[str, Any]) -> str:
    """The results in a few lines."""
    lines = []
    for name, source in results["sources"].items():
        split, metrics = next(iter(source["metrics"].items()))
        how = "trained" if source["trained_here"] else "loaded"
        metric = source["primary_metric"]
        lines.append(f"source {name:8} {split} {metric} {metrics[metric]:.4f} ({how})")
    target, config = results["target"], results["config"]
    for split, metrics in target["metrics"].items():
        for metric, value in metrics.items():
            trivial = target["baseline"][split].get(metric)
            known = "" if trivial is None else f" (trivial {trivial:.4f})"
            lines.append(f"target {config['target']} {split} {metric} {value:.4f}{known}")
    count = target["parameters"]
    lines.append(f"trained: {count['transfer']:,} parameters of {config['method']}, {count['head']:,} of the head")
    folded = target["folded"]
    if "reason" in folded:
        lines.append(f"not folded: {folded['reason']}")
    else:
        same = "the same" if folded["same_predictions"] else "other"
        lines.append(f"folded: {same} predictions, largest difference {folded['largest_logit_difference']:.1e}")
    return "\n".join(lines)
