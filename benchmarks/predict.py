"""The throughput of a `Predictor` that answers requests for eight tasks, as ratios within one run.

    python benchmarks/predict.py [--json OUT] [--requests N] [--rounds N] [--host adapters|peft] [--model ID_OR_PATH]

* `one task`: the same texts through one single-task model, in the same `Predictor`.
* `loop`: a loop over the tasks with bottleneck adapters and heads of `adapters` itself, batches of 32 in the order in
  which the requests came.
* `loop in batches`: the same loop over each 32 requests as they come, as a service has to that gathers requests.

A round measures base, eight tasks, base; the ratio is the throughput of the eight tasks over the mean of the two, and
the median over the rounds counts. The texts are random words with the lengths of eight GLUE tasks.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

import pal_adapters
from pal_adapters.multitask import Predictor, Task, TaskHeads, add_adapter, default_model

LENGTHS = {"cola": 11, "sst2": 25, "qqp": 30, "stsb": 31, "mnli": 39, "qnli": 50, "mrpc": 53, "rte": 70}
"""About the mean number of tokens of an example of each task."""
LONGEST = 128
BATCH = 32
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
]


def make_requests(count: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    requests = []
    for number in range(count):
        task = list(LENGTHS)[number % len(LENGTHS)]
        length = min(LONGEST, max(3, round(LENGTHS[task] * draw.lognormvariate(-0.08, 0.4))))
        requests.append({"task": task, "text": " ".join(draw.choices(WORDS, k=length - 2))})
    draw.shuffle(requests)
    return requests


def make_predictor(folder: str, host: str, names: list[str]) -> Predictor:
    base: Any = AutoModel.from_pretrained(folder)
    for name in names:
        peft = {"task_type": "FEATURE_EXTRACTION"}
        config = pal_adapters.PALPeftConfig(**peft) if host == "peft" else pal_adapters.PALConfig()
        base = add_adapter(base, name, config)
    model = TaskHeads(base)
    tasks = [Task(name, {}, text_columns=("text",), num_labels=2) for name in names]
    for task in tasks:
        model.add(task.name, task.head_config())
    described = [task.describe(max_length=LONGEST) for task in tasks]
    return Predictor(model.eval(), AutoTokenizer.from_pretrained(folder), described)


def make_loop(folder: str) -> Callable[[list[dict[str, str]]], None]:
    import adapters

    model: Any = adapters.AutoAdapterModel.from_pretrained(folder)
    for name in LENGTHS:
        model.add_adapter(name, config="seq_bn")
        model.add_classification_head(name, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()

    @torch.no_grad()
    def run(requests: list[dict[str, str]]) -> None:
        for name in LENGTHS:
            model.set_active_adapters(name)
            model.active_head = name
            texts = [request["text"] for request in requests if request["task"] == name]
            for start in range(0, len(texts), BATCH):
                part = texts[start : start + BATCH]
                inputs = tokenizer(part, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
                model(**inputs).logits.softmax(-1).argmax(-1).tolist()

    return run


def in_batches(run: Callable[[list[dict[str, str]]], Any], requests: list[dict[str, str]]) -> None:
    for start in range(0, len(requests), BATCH):
        run(requests[start : start + BATCH])


@contextmanager
def seconds(into: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into.append(time.perf_counter() - start)


def ratio(base: Callable[[], Any], variant: Callable[[], Any], rounds: int) -> dict[str, float]:
    base(), variant()  # warm
    found, all_bases, all_variants = [], [], []
    for _ in range(rounds):
        bases: list[float] = []
        variants: list[float] = []
        for run, into in ((base, bases), (variant, variants), (base, bases)):
            with seconds(into):
                run()
        found.append(statistics.mean(bases) / variants[0])
        all_bases += bases
        all_variants += variants
    return {
        "ratio": round(statistics.median(found), 3),
        "lowest": round(min(found), 3),
        "highest": round(max(found), 3),
        "seconds of the eight tasks": round(statistics.median(all_variants), 2),
        "seconds of the other": round(statistics.median(all_bases), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="OUT", help="file for the results")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--host", choices=("adapters", "peft"), default="adapters", help="host of the eight tasks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="base model (default: the MiniLM encoder that pip installs)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # The host warns as long as a model has adapters and none is active.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    folder = options.model or default_model()
    requests = make_requests(options.requests)
    same = [{**request, "task": "sst2"} for request in requests]
    eight = make_predictor(folder, options.host, list(LENGTHS))
    one = make_predictor(folder, options.host, ["sst2"])
    loop = make_loop(folder)
    result: dict[str, Any] = {
        "versions": {p: version(p) for p in ("torch", "transformers", "adapters", "peft")},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "requests": len(requests),
        "host": options.host,
        "to one task": ratio(
            lambda: one(same, progress=False), lambda: eight(requests, progress=False), options.rounds
        ),
        "to a loop": ratio(lambda: loop(requests), lambda: eight(requests, progress=False), options.rounds),
        "to a loop in batches": ratio(
            lambda: in_batches(loop, requests),
            lambda: in_batches(lambda part: eight(part, progress=False), requests),
            options.rounds,
        ),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
