"""Trains adapters for source tasks, learns how to combine them for a target task, and folds the result.

Tasks are named as for `train`. Stage one trains one adapter per source and saves it to `--source_dir`; sources that
are already saved there are loaded instead. Stage two freezes the base and the sources and trains a combination and a
new head:

* scalearn, scalearn_uniform, scalearn_pp, scalearn_uniform_pp: learned coefficients, from one per channel and source
  in every block down to one per source;
* fusion: AdapterFusion, attention over the sources;
* average: equal weights for all sources, only the head is trained;
* single: no sources, a separate adapter for the target.

A tenth of the training data selects the best epoch. The validation data is used only for the final scores. Writes
`results.json`, a heat map of the sources (`transfer.png`, `.svg`), the target's combination and head, and the folded
adapter: one plain adapter, checked to make the same predictions. `pal-adapters predict` and `serve` read the folder.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.multitask import TaskHeads

from . import fitting
from .combining import HOSTS, draw, read_record
from .options import parse
from .shared import POOLINGS, described, first_line, load_base, load_tasks, make_folder, versions, write_json
from .transfer_options import TransferOptions, summary

TOLERANCE = 1e-3


class Run:
    """One run of the command: the tasks, and the host with the adapters."""

    def __init__(self, args: Any) -> None:
        self.args = args
        pooling = POOLINGS[args.pooling]
        (self.target,) = load_tasks("--target", [args.target], args.data_dir, pooling=pooling)
        names = [] if args.method == "single" else args.sources
        self.sources = load_tasks("--sources", names, args.data_dir, pooling=pooling)
        for task in self.sources:
            if task.name == self.target.name and task.benchmark != self.target.benchmark:
                both = f"--target {self.target.full_name} and --sources {task.full_name}"
                raise ConfigError(f"{both} have the same name; leave one out")
        self.output = make_folder("--output_dir", args.output_dir)
        self.source_dir = make_folder("--source_dir", args.source_dir)
        base, self.tokenizer = load_base(args.model, args.max_length)
        width, self.base_size = base.config.hidden_size, fitting.size(base)
        if args.reduction_factor > width:
            raise ConfigError(
                f"reduction_factor={args.reduction_factor} is not allowed: use a number from 1 to {width}"
            )
        self.host: Any = HOSTS[args.host](base, args.reduction_factor, self.source_dir)
        self.device = ""

    def fit(self, task: Any, add: Any, *, source: bool) -> tuple[dict[str, Any], Any, Any, Any]:
        """Trains what `add` adds and a new head; returns the results, the trainer, the data and the setup."""
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
        model = TaskHeads(self.host.model)
        model.add(task.name, task.head_config(), adapter=setup)
        return model

    def save(self, model: Any, task: Any, setup: Any, folder: Path) -> None:
        (folder / task.name).mkdir(parents=True, exist_ok=True)
        self.host.save(setup, folder / task.name)
        fitting.save_head(model, task.name, folder / task.name)

    def save_model(self, model: Any, result: dict[str, Any]) -> None:
        """Writes the folder of the target that `Predictor` and `pal-adapters fold` read."""
        shutil.rmtree(self.output / "model", ignore_errors=True)
        task = described(self.target, self.args.max_length, result)
        model.save_pretrained(self.output / "model", processing_class=self.tokenizer, tasks=[task])

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
        result = read_record(record, made)
        try:
            setup = self.host.load(task.name, record.parent)
            fitting.load_head(self.task_heads(task, setup), task.name, record.parent)
        except Exception as error:  # the hosts raise OSError, ValueError, RuntimeError and more
            raise ConfigError(f"{record.parent}: the source cannot be loaded ({first_line(error)})") from error
        return result

    def train_target(self) -> dict[str, Any]:
        args, task = self.args, self.target
        names = [source.name for source in self.sources]

        def add() -> Any:
            return self.host.combine(task.name, names, args.method) if names else self.host.add(task.name)

        result, trainer, data, setup = self.fit(task, add, source=False)
        self.save(trainer.model, task, setup, self.output / "target")
        self.save_model(trainer.model, result)
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
            raise ConfigError(f"the folded adapter differs from the combination by {difference:.1e} in a logit")
        result: dict[str, Any] = {
            "largest_logit_difference": difference,
            "same_predictions": all(bool((after[s].argmax(-1) == before[s].argmax(-1)).all()) for s in before),
            "metrics": fitting.score(data, after),
        }
        widths = getattr(folded, "widths", None)
        return result | ({"widths": dict(widths)} if widths is not None else {})


def run(args: Any) -> dict[str, Any]:
    """Runs both stages and writes the folder; returns the results."""
    start = time.perf_counter()
    this = Run(args)
    for old in ("target", "folded"):
        shutil.rmtree(this.output / old, ignore_errors=True)
    sources = this.train_or_load_sources()
    target = this.train_target()
    results = {
        "config": vars(args) | {"sources": list(sources), "target": this.target.full_name},
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
    """Runs the command."""
    args, _ = parse("pal-adapters transfer", __doc__, argv, TransferOptions)
    print(summary(run(args)))
    print(f"written: {args.output_dir}")
    return 0
