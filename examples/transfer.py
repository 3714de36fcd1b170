"""Trains adapters for source tasks once, then learns how to combine them for a target task, and folds the result.

    python examples/transfer.py --data_dir DATA --sources rte mrpc cola stsb sst2 qnli --target copa \\
        --method scalearn --output_dir out --source_dir sources

`DATA` holds `<task>/train.jsonl[.gz]` and `<task>/validation.jsonl[.gz]`, or folders `glue` and `super_glue` with
such folders inside. Stage one trains one adapter a source, on its own, and saves it to `--source_dir`; sources that
are saved there already are loaded. Stage two freezes the base and the sources and trains a combination and a new head:

* scalearn, scalearn_uniform, scalearn_pp, scalearn_uniform_pp: learned coefficients, from one a channel in every block
  down to one a source in all;
* fusion: AdapterFusion, attention over the sources;
* average: all sources alike, only the head is trained;
* single: no sources, an adapter of its own for the target.

The best epoch is chosen on a tenth of the training rows. The validation rows are used once, for the scores at the end.
Writes `results.json`, a heat map of the sources (`transfer.png`, `.svg`), the target's combination and head, and the
folded adapter, one plain adapter that gives the same predictions, which is checked.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_tasks import (
    InputError,
    Parser,
    first_line,
    load_base,
    positive_float,
    positive_int,
    seed_int,
    versions,
)

SCALEARN = ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp")
METHODS = (*SCALEARN, "fusion", "single", "average")
# For each preset and kind of training: epochs, learning rate, epochs without a better one before it stops.
# "paper": the scripts of ScaLearn's authors, for RoBERTa-base. "small": minutes on two cores, with MiniLM.
RECIPES: dict[str, dict[str, tuple[int, float, int | None]]] = {
    "paper": {"source": (30, 3e-4, 5), "fusion": (30, 5e-5, 5), "scalearn": (30, 6e-3, None)},
    "small": {"source": (6, 1e-3, 2), "fusion": (6, 5e-4, 2), "scalearn": (12, 6e-3, None)},
}
TRAIN_ROWS = {"paper": None, "small": 4000}
TOLERANCE = 1e-3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="folder with the data")
    parser.add_argument("--sources", nargs="+", default=[], help="names of the source tasks (not for single)")
    parser.add_argument("--target", required=True, help="name of the target task; it may be a source as well")
    parser.add_argument("--method", choices=METHODS, required=True, help="how the sources are combined")
    parser.add_argument("--output_dir", required=True, help="folder for the results")
    parser.add_argument("--source_dir", help="folder that source adapters are saved to and loaded from (OUT/sources)")
    parser.add_argument("--host", choices=("adapters", "peft"), default="adapters", help="library of the adapters")
    parser.add_argument("--model", help="name or folder of the base (a MiniLM encoder that comes with pip)")
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="what the heads see of the tokens")
    parser.add_argument(
        "--preset", choices=tuple(RECIPES), default="paper", help="recipe; the options below change it"
    )
    parser.add_argument("--reduction_factor", type=positive_float, default=16, help="of the sources' bottlenecks")
    parser.add_argument("--source_epochs", type=positive_int, help="passes over a source's rows (by preset)")
    parser.add_argument("--source_learning_rate", type=positive_float, help="of the sources (by preset)")
    parser.add_argument("--epochs", type=positive_int, help="passes over the target's rows (by preset)")
    parser.add_argument("--learning_rate", type=positive_float, help="of the target stage (by preset)")
    parser.add_argument("--train_rows", type=positive_int, help="at most so many training rows a task (by preset)")
    parser.add_argument("--max_steps", type=positive_int, help="upper bound on the steps of each training run")
    parser.add_argument(
        "--select", choices=("loss", "metric"), default="loss", help="what the best epoch is chosen by"
    )
    parser.add_argument("--batch_size", type=positive_int, default=32, help="rows of a batch")
    parser.add_argument("--max_length", type=positive_int, default=128, help="tokens after which a text is cut")
    parser.add_argument("--seed", type=seed_int, default=0, help="seed of the target stage")
    parser.add_argument(
        "--source_seed", type=seed_int, default=0, help="seed of the sources, whatever the target's is"
    )
    args = parser.parse_args(argv)
    if args.method == "single":
        for name in ("source_epochs", "source_learning_rate"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} has no effect with --method single, which uses no sources; leave it out")
    elif not args.sources:
        parser.error(f"--sources is needed with --method {args.method}")
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


class Run:
    """One run of the script: the data, the model, and what it found."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from pal_adapters.multitask import BatchMaker, TransferModel, load_task

        self.args = args
        target, self.target_splits = load_task(args.target, args.data_dir)
        self.target = target
        loaded = [] if args.method == "single" else [load_task(name, args.data_dir) for name in args.sources]
        names = [spec.name for spec, _ in loaded]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"--sources: {name} is named twice")
        for spec, _ in loaded:
            if spec.name == target.name and spec.benchmark != target.benchmark:
                raise InputError(
                    f"--target {target.full_name} and --sources {spec.full_name} have one name; leave one out"
                )
        self.sources = loaded
        self.output, self.source_dir = Path(args.output_dir), Path(args.source_dir)
        for folder, option in ((self.output, "--output_dir"), (self.source_dir, "--source_dir")):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{option} {folder}: cannot be made ({error.strerror})") from error
        base, self.tokenizer = load_base(args.model, args.max_length)
        base.to("cuda" if torch.cuda.is_available() else "cpu")
        self.base_name = str(args.model or "default")
        try:
            self.model = TransferModel(
                base, host=args.host, reduction_factor=args.reduction_factor, pooling=args.pooling
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self.batches = BatchMaker(self.tokenizer, self.model.device)

    def data(self, spec: Any, splits: Any) -> Any:
        from pal_adapters.multitask import TaskData, encode_rows, train_dev_split

        rows = splits["train"]
        if self.args.train_rows is not None and len(rows) > self.args.train_rows:
            rows = rows.shuffle(seed=42).select(range(self.args.train_rows))
        # One split for all seeds and for both stages, so that no row to choose with was trained on.
        parts = train_dev_split(rows, seed=42, split_columns=spec.split_columns)
        train, dev = (encode_rows(spec, part, self.tokenizer, self.args.max_length) for part in parts)
        tests = {n: encode_rows(spec, splits[n], self.tokenizer, self.args.max_length) for n in splits if n != "train"}
        return TaskData(spec, train, dev, tests)

    def fit(self, data: Any, *, source: bool) -> dict[str, Any]:
        from pal_adapters.multitask import TrainingConfig, baseline, fit, primary_metric

        args, spec = self.args, data.spec
        config = TrainingConfig(
            epochs=args.source_epochs if source else args.epochs,
            learning_rate=args.source_learning_rate if source else args.learning_rate,
            patience=args.source_patience if source else args.patience,
            seed=args.source_seed if source else args.seed,
            batch_size=args.batch_size,
            max_steps=args.max_steps,
            select=args.select,
            warmup=0.0,
            weight_decay=0.0,
        )
        began = time.perf_counter()
        done = fit(self.model, [data], config, self.batches)
        count = self.model.count(spec.name)
        return {
            "benchmark": spec.benchmark,
            "rows": {"train": len(data.train), "dev": len(data.dev)} | {s: len(r) for s, r in data.test.items()},
            "primary_metric": primary_metric(spec),
            "metrics": self.scores(data),
            "baseline": {split: baseline(spec, data.train, rows) for split, rows in data.test.items()},
            "dev_history": [scores[spec.name] for scores in done.history],
            "best_epoch": done.best_epoch,
            "steps": done.steps,
            "parameters": {"transfer": count["adapter"], "head": count["head"]},
            "seconds": round(time.perf_counter() - began, 2),
        }

    def scores(self, data: Any) -> dict[str, dict[str, float]]:
        from pal_adapters.multitask import predict, score

        return {
            split: score(data.spec, rows, predict(self.model, data.spec, rows, self.batches))
            for split, rows in data.test.items()
        }

    def train_or_load_sources(self) -> dict[str, Any]:
        import transformers

        results = {}
        made = {"model": self.base_name, "reduction_factor": self.args.reduction_factor, "pooling": self.args.pooling}
        for spec, splits in self.sources:
            folder = self.source_dir / spec.name
            record = folder / "source.json"
            if record.is_file():
                results[spec.name] = self.load_source(spec, record, made) | {"trained_here": False}
                continue
            transformers.set_seed(self.args.source_seed)
            self.model.add_task(spec)
            result = self.fit(self.data(spec, splits), source=True)
            # The record comes last: a source that was cut off is trained again.
            self.model.save_task(spec.name, self.source_dir)
            record.write_text(json.dumps(made | {"result": result}, indent=2) + "\n", encoding="utf-8")
            results[spec.name] = result | {"trained_here": True}
        return results

    def load_source(self, spec: Any, record: Path, made: dict[str, Any]) -> dict[str, Any]:
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
            result = known.pop("result")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{record}: not a readable record of a source ({first_line(error)})") from error
        for key, value in made.items():
            if known.get(key) != value:
                raise InputError(f"{record}: the source was made with {key}={known.get(key)}, not {value}")
        try:
            self.model.load_task(spec, self.source_dir)
        except Exception as error:  # hosts raise OSError, ValueError, RuntimeError and more
            raise InputError(f"{record.parent}: the source cannot be loaded ({first_line(error)})") from error
        return dict(result)

    def train_target(self) -> dict[str, Any]:
        import transformers

        args, spec = self.args, self.target
        transformers.set_seed(args.seed)
        data = self.data(spec, self.target_splits)
        if args.method == "single":
            self.model.add_task(spec)
        else:
            self.model.combine(spec, [s.name for s, _ in self.sources], args.method)
        result = self.fit(data, source=False)
        self.model.save_task(spec.name, self.output / "target")
        if args.method != "single":
            result["transfer"] = self.draw(data)
        result["folded"] = self.fold(data)
        return result

    def draw(self, data: Any) -> dict[str, Any]:
        from pal_adapters import plot_transfer

        inputs = None
        if self.args.method == "fusion":
            size = self.args.batch_size
            rows = range(len(data.dev))
            inputs = [self.batches(data.spec, data.dev, rows[i : i + size])[0] for i in rows[::size]]
        table = self.model.table(data.spec.name, inputs)
        for kind in ("png", "svg"):
            plot_transfer(table, self.output / f"transfer.{kind}", title=f"{self.args.method} for {data.spec.name}")
        print(f"\n{table}\n")
        values: dict[str, Any] = table.to_dict()
        return values

    def fold(self, data: Any) -> dict[str, Any]:
        """Folds the combination, saves it, and compares it with what it was made of."""
        import numpy as np

        from pal_adapters.errors import UnsupportedError
        from pal_adapters.multitask import predict

        spec = data.spec
        if self.args.method == "single":
            return {"reason": "single is one plain adapter already"}
        before = {s: predict(self.model, spec, rows, self.batches) for s, rows in data.test.items()}
        try:
            folded = self.model.fold(spec.name)
        except UnsupportedError as error:
            return {"reason": str(error)}
        after = {s: predict(self.model, spec, rows, self.batches) for s, rows in data.test.items()}
        self.model.save_task(spec.name, self.output / "folded")
        difference = max(float(np.abs(after[s] - before[s]).max()) for s in before)
        same = all((after[s].argmax(-1) == before[s].argmax(-1)).all() for s in before)
        if difference > TOLERANCE:
            raise InputError(f"the folded adapter differs from the combination by {difference:.1e} in a logit")
        result: dict[str, Any] = {
            "largest_logit_difference": difference,
            "same_predictions": bool(same),
            "metrics": self.scores(data),
        }
        widths = getattr(folded, "widths", None)
        return result | ({"widths": dict(widths)} if widths is not None else {})


def run(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    this = Run(args)
    for old in ("target", "folded"):
        shutil.rmtree(this.output / old, ignore_errors=True)
    sources = this.train_or_load_sources()
    target = this.train_target()
    results = {
        "config": vars(args) | {"sources": list(sources), "target": this.target.full_name},
        "versions": versions(),
        "device": str(this.model.device),
        "base_parameters": this.model.base_total,
        "sources": sources,
        "target": target,
        "seconds": round(time.perf_counter() - start, 2),
    }
    (this.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


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


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # This host warns that no adapter is active while it activates the first one.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    try:
        from pal_adapters.errors import PalAdaptersError

        results = run(args)
    except ImportError as error:
        print(f"transfer.py: error: {error}; pip install 'pal-adapters[all]'", file=sys.stderr)
        return 1
    except (InputError, PalAdaptersError) as error:
        print(f"transfer.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(summary(results))
    print(f"written: {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
