"""The command line of `transfer.py`: options, recipes and printed summary."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import parser, positive_float, positive_int, seed_int

SCALEARN = ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp")
METHODS = (*SCALEARN, "fusion", "single", "average")
# For each preset and kind of training: epochs, learning rate, early-stopping patience in epochs.
# "paper": the scripts of ScaLearn's authors, for RoBERTa-base. "small": minutes on two cores, with MiniLM.
RECIPES: dict[str, dict[str, tuple[int, float, int | None]]] = {
    "paper": {"source": (30, 3e-4, 5), "fusion": (30, 5e-5, 5), "scalearn": (30, 6e-3, None)},
    "small": {"source": (6, 1e-3, 2), "fusion": (6, 5e-4, 2), "scalearn": (12, 6e-3, None)},
}
TRAIN_ROWS = {"paper": None, "small": 4000}


def parse(argv: Sequence[str] | None, doc: str | None = None) -> argparse.Namespace:
    options = parser(doc)
    options.add_argument("--data_dir", required=True, help="folder with the data")
    options.add_argument("--sources", nargs="+", default=[], help="names of the source tasks (not for single)")
    options.add_argument("--target", required=True, help="name of the target task; it may also be a source")
    options.add_argument("--method", choices=METHODS, required=True, help="how the sources are combined")
    options.add_argument("--output_dir", required=True, help="folder for the results")
    options.add_argument("--source_dir", help="folder for saving and loading source adapters (OUT/sources)")
    options.add_argument("--host", choices=("adapters", "peft"), default="adapters", help="library of the adapters")
    options.add_argument("--model", help="name or folder of the base model (the MiniLM encoder that pip installs)")
    options.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="how heads pool the tokens")
    options.add_argument(
        "--preset", choices=tuple(RECIPES), default="paper", help="recipe; the options below change it"
    )
    options.add_argument(
        "--reduction_factor", type=positive_float, default=16, help="reduction factor of the sources' bottlenecks"
    )
    options.add_argument("--source_epochs", type=positive_int, help="epochs over a source's data (by preset)")
    options.add_argument(
        "--source_learning_rate", type=positive_float, help="learning rate of the sources (by preset)"
    )
    options.add_argument("--epochs", type=positive_int, help="epochs over the target's data (by preset)")
    options.add_argument("--learning_rate", type=positive_float, help="learning rate of the target stage (by preset)")
    options.add_argument(
        "--train_rows", type=positive_int, help="maximum number of training examples per task (by preset)"
    )
    options.add_argument("--max_steps", type=positive_int, help="maximum number of steps of each training run")
    options.add_argument("--select", choices=("loss", "metric"), default="loss", help="what selects the best epoch")
    options.add_argument("--batch_size", type=positive_int, default=32, help="batch size")
    options.add_argument(
        "--max_length", type=positive_int, default=128, help="maximum number of tokens; longer texts are truncated"
    )
    options.add_argument("--seed", type=seed_int, default=0, help="seed of the target stage")
    options.add_argument("--source_seed", type=seed_int, default=0, help="seed of the sources, independent of --seed")
    args = options.parse_args(argv)
    if args.method == "single":
        for name in ("source_epochs", "source_learning_rate"):
            if getattr(args, name) is not None:
                options.error(f"--{name} has no effect with --method single, which uses no sources; leave it out")
    elif not args.sources:
        options.error(f"--sources is needed with --method {args.method}")
    args.source_dir = args.source_dir or str(Path(args.output_dir) / "sources")
    if args.train_rows is None:
        args.train_rows = TRAIN_ROWS[args.preset]
    recipe = RECIPES[args.preset]
    kind = "source" if args.method == "single" else "fusion" if args.method == "fusion" else "scalearn"
    epochs, learning_rate, args.patience = recipe[kind]
    args.epochs, args.learning_rate = args.epochs or epochs, args.learning_rate or learning_rate
    epochs, learning_rate, args.source_patience = recipe["source"]
    args.source_epochs = args.source_epochs or epochs
    args.source_learning_rate = args.source_learning_rate or learning_rate
    return args


def summary(results: dict[str, Any]) -> str:
    lines = []
    for name, source in results["sources"].items():
        split, metrics = next(iter(source["metrics"].items()))
        how = "trained" if source["trained_here"] else "loaded"
        metric = source["primary_metric"]
        lines.append(f"source {name:8} {split} {metric} {metrics[metric]:.4f} ({how})")
    target, config = results["target"], results["config"]
    for split, metrics in target["metrics"].items():
        for metric, value in metrics.items():
            trivial = target["baseline"][split][metric]
            lines.append(f"target {config['target']} {split} {metric} {value:.4f} (trivial {trivial:.4f})")
    count = target["parameters"]
    lines.append(f"trained: {count['transfer']:,} parameters of {config['method']}, {count['head']:,} of the head")
    folded = target["folded"]
    if "reason" in folded:
        lines.append(f"not folded: {folded['reason']}")
    else:
        same = "the same" if folded["same_predictions"] else "other"
        lines.append(f"folded: {same} predictions, largest difference {folded['largest_logit_difference']:.1e}")
    return "\n".join(lines)
