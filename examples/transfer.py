"""Trains adapters for source tasks, learns how to combine them for a target task, and folds the result.

    python examples/transfer.py --data_dir DATA --sources rte mrpc cola stsb sst2 qnli --target copa \\
        --method scalearn --output_dir out --source_dir sources

`DATA` contains `<task>/train.jsonl[.gz]` and `<task>/validation.jsonl[.gz]`, or folders `glue` and `super_glue` with
such folders inside. Stage one trains one adapter per source and saves it to `--source_dir`; sources that are already
saved there are loaded instead. Stage two freezes the base and the sources and trains a combination and a new head:

* scalearn, scalearn_uniform, scalearn_pp, scalearn_uniform_pp: learned coefficients, from one per channel and source
  in every block down to one per source;
* fusion: AdapterFusion, attention over the sources;
* average: equal weights for all sources, only the head is trained;
* single: no sources, a separate adapter for the target.

A tenth of the training data selects the best epoch. The validation data is used only for the final scores. Writes
`results.json`, a heat map of the sources (`transfer.png`, `.svg`), the target's combination and head, and the folded
adapter: one plain adapter, checked to make the same predictions.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from combining import HOSTS, draw, read_record
from command_line import InputError, first_line, guarded, load_base, make_folder, named_once, versions, write_json
from transfer_cli import parse, summary

TOLERANCE = 1e-3


class Run:
    """One run of the script: the tasks, and the host with the adapters."""

    def __init__(self, args: argparse.Namespace) -> None:
        from fitting import size

        from pal_adapters.multitask import Task

        self.args = args
        pooling = {"mean": "mean", "cls": "first"}[args.pooling]
        self.target = Task.named(args.target, args.data_dir, pooling=pooling)
        names = [] if args.method == "single" else args.sources
        self.sources = [Task.named(name, args.data_dir, pooling=pooling) for name in names]
        named_once("--sources", [task.name for task in self.sources])
        for task in self.sources:
            if task.name == self.target.name and task.benchmark != self.target.benchmark:
                both = f"--target {full_name(self.target)} and --sources {full_name(task)}"
                raise InputError(f"{both} have the same name; leave one out")
        self.output = make_folder("--output_dir", args.output_dir)
        self.source_dir = make_folder("--source_dir", args.source_dir)
        base, self.tokenizer = load_base(args.model, args.max_length)
        width, self.base_size = base.config.hidden_size, size(base)
        if args.reduction_factor > width:
            raise InputError(
                f"reduction_factor={args.reduction_factor} is not allowed: use a number from 1 to {width}"
            )
        self.host: Any = HOSTS[args.host](base, args.reduction_factor, self.source_dir)
        self.device = ""

    def fit(self, task: Any, add: Any, *, source: bool) -> tuple[dict[str, Any], Any, Any, Any]:
        """Trains what `add` adds and a new head; returns the results, the trainer, the data and the setup."""
        import fitting
        import transformers

        args, began = self.args, time.perf_counter()
        # One split for all seeds and both stages, so that no stage trains on examples that select the best epoch.
        data = fitting.encode(task, self.tokenizer, args.max_length, seed=42, limit=args.train_rows)
        seed = args.source_seed if source else args.seed
        transformers.set_seed(seed)
        setup = add()
        model = self.task_heads(task, setup)
        model.prepare_training()
        trainer = fitting.train(
            model,
            [data],
            self.tokenizer,
            self.output,
            epochs=args.source_epochs if source else args.epochs,
            learning_rate=args.source_learning_rate if source else args.learning_rate,
            patience=args.source_patience if source else args.patience,
            seed=seed,
            batch_size=args.batch_size,
            max_steps=args.max_steps,
            select=args.select,
            warmup=0.0,
            weight_decay=0.0,
            group_by_length=True,
        )
        self.device = str(model.device)
        head = fitting.size(model.head(task.name))
        added = model.count_parameters()["trainable"] - head
        result = fitting.summary(trainer, data) | {
            "steps": trainer.state.global_step,
            "parameters": {"transfer": added, "head": head},
            "seconds": round(time.perf_counter() - began, 2),
        }
        return result, trainer, data, setup

    def task_heads(self, task: Any, setup: Any) -> Any:
        from pal_adapters.multitask import TaskHeads

        model = TaskHeads(self.host.model)
        model.add(task.name, task.head_config(), adapter=setup)
        return model

    def save(self, model: Any, task: Any, setup: Any, folder: Path) -> None:
        from fitting import save_head

        (folder / task.name).mkdir(parents=True, exist_ok=True)
        self.host.save(setup, folder / task.name)
        save_head(model, task.name, folder / task.name)

    def train_or_load_sources(self) -> dict[str, Any]:
        results = {}
        made = {
            "model": str(self.args.model or "default"),
            "reduction_factor": self.args.reduction_factor,
            "pooling": self.args.pooling,
        }
        for task in self.sources:
            record = self.source_dir / task.name / "source.json"
            if record.is_file():
                results[task.name] = self.load_source(task, record, made) | {"trained_here": False}
                continue
            result, trainer, _, setup = self.fit(task, lambda task=task: self.host.add(task.name), source=True)
            # The record is written last: an interrupted source is trained again.
            self.save(trainer.model, task, setup, self.source_dir)
            write_json(record, made | {"result": result})
            results[task.name] = result | {"trained_here": True}
        return results

    def load_source(self, task: Any, record: Path, made: dict[str, Any]) -> dict[str, Any]:
        from fitting import load_head

        result = read_record(record, made)
        try:
            setup = self.host.load(task.name, record.parent)
            load_head(self.task_heads(task, setup), task.name, record.parent)
        except Exception as error:  # the hosts raise OSError, ValueError, RuntimeError and more
            raise InputError(f"{record.parent}: the source cannot be loaded ({first_line(error)})") from error
        return result

    def train_target(self) -> dict[str, Any]:
        args, task = self.args, self.target
        names = [source.name for source in self.sources]

        def add() -> Any:
            return self.host.combine(task.name, names, args.method) if names else self.host.add(task.name)

        result, trainer, data, setup = self.fit(task, add, source=False)
        self.save(trainer.model, task, setup, self.output / "target")
        if args.method == "single":
            result["folded"] = {"reason": "single is already one plain adapter"}
        else:
            batches = trainer.get_eval_dataloader(data.dev) if args.method == "fusion" else None
            title = f"{args.method} for {task.name}"
            result["transfer"] = draw(self.host.model, setup, batches, self.output / "transfer", title)
            result["folded"] = self.fold(trainer, data, setup)
        return result

    def fold(self, trainer: Any, data: Any, setup: Any) -> dict[str, Any]:
        """Folds the combination, saves the folded adapter, and compares the two."""
        import fitting
        import numpy as np

        from pal_adapters.errors import UnsupportedError

        task, name = self.target, f"{self.target.name}_folded"
        before = fitting.predict(trainer, data)
        try:
            folded = self.host.fold(setup, name)
        except UnsupportedError as error:
            return {"reason": str(error)}
        model = self.task_heads(task, name)
        model.head(task.name).load_state_dict(trainer.model.head(task.name).state_dict())
        with tempfile.TemporaryDirectory() as folder:
            after = fitting.predict(fitting.make_trainer(model, [data], self.tokenizer, folder), data)
        self.save(model, task, name, self.output / "folded")
        difference = max(float(np.abs(after[s] - before[s]).max()) for s in before)
        if difference > TOLERANCE:
            raise InputError(f"the folded adapter differs from the combination by {difference:.1e} in a logit")
        result: dict[str, Any] = {
            "largest_logit_difference": difference,
            "same_predictions": all(bool((after[s].argmax(-1) == before[s].argmax(-1)).all()) for s in before),
            "metrics": fitting.score(data, after),
        }
        widths = getattr(folded, "widths", None)
        return result | ({"widths": dict(widths)} if widths is not None else {})


def full_name(task: Any) -> str:
    return f"{task.benchmark}/{task.name}"


def run(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    this = Run(args)
    for old in ("target", "folded"):
        shutil.rmtree(this.output / old, ignore_errors=True)
    sources = this.train_or_load_sources()
    target = this.train_target()
    results = {
        "config": vars(args) | {"sources": list(sources), "target": full_name(this.target)},
        "versions": versions(),
        "device": this.device,
        "base_parameters": this.base_size,
        "sources": sources,
        "target": target,
        "seconds": round(time.perf_counter() - start, 2),
    }
    write_json(this.output / "results.json", results)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv, __doc__)
    results = guarded("transfer.py", lambda: run(args))
    if results is None:
        return 1
    print(summary(results))
    print(f"written: {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
