"""Load on the service: one process for eight tasks against one process per task with PEFT's own classifier.

    python benchmarks/serve.py --output out.json                 # requests per second, latencies and memory
    python benchmarks/serve.py --output out.json --soak 120      # and two minutes under faults

Both sides run on the same cores with the same base model (MiniLM), the same adapters (a PAL per task; the weights are
random, as only speed matters), the same HTTP code and batching. Clients are closed loops: each sends its next request,
for a random task, when the last one was answered. The soak mixes good requests with bad JSON, unknown tasks, bodies
that are too large and clients that leave before the answer, and ends with SIGTERM while requests are in progress. Each
answer is compared with the predictor's own, and memory at the end with memory after the first quarter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

TASKS = tuple(f"task{number}" for number in range(8))
WORDS = [
    "the",
    "a",
    "film",
    "book",
    "cook",
    "singer",
    "was",
    "is",
    "seemed",
    "very",
    "quite",
    "wonderful",
    "dull",
    "and",
    "but",
    "slow",
    "here",
    "today",
]
ROOT = Path(__file__).resolve().parents[1]


def texts(count: int, seed: int) -> list[str]:
    """Sentences of 5 to 40 words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) for _ in range(count)]


def make_folder(folder: str, model: str | None) -> None:
    """Saves one base with eight tasks."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from pal_adapters import PALPeftConfig
    from pal_adapters.multitask import HeadConfig, TaskHeads, add_adapter, default_model
    from pal_adapters.multitask.model.task_description import TaskDescription

    torch.manual_seed(0)
    name = model or default_model()
    base: Any = AutoModel.from_pretrained(name)
    for task in TASKS:
        base = add_adapter(base, task, PALPeftConfig(task_type="FEATURE_EXTRACTION"))
    heads = TaskHeads(base)
    for task in TASKS:
        heads.add(task, HeadConfig("single_label", 2))
    described = [TaskDescription(task, "single_label", ("text",), ("no", "yes")) for task in TASKS]
    heads.save_pretrained(folder, processing_class=AutoTokenizer.from_pretrained(name), tasks=described)


@dataclass(frozen=True)
class Told:
    """A description or prediction that is a dict already."""

    content: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.content


class HostClassifier:
    """One task with PEFT's own model for sequence classification."""

    def __init__(self, task: str, model: str | None) -> None:
        from peft import get_peft_model
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from pal_adapters import PALPeftConfig
        from pal_adapters.multitask import default_model

        name = model or default_model()
        base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
        self.model = get_peft_model(base, PALPeftConfig(task_type="SEQ_CLS")).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.tasks = {task: Told({"kind": "single_label", "text_columns": ["text"]})}

    def check(self, request: Mapping[str, Any]) -> None:
        """Nothing: a tokenizer with settings for each call must not be used by two threads."""

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> list[Told]:
        import torch

        given = [request["text"] for request in requests]
        batch = self.tokenizer(given, truncation=True, max_length=128, padding=True, return_tensors="pt")
        with torch.no_grad():
            scores = self.model(**batch).logits.softmax(-1).tolist()
        return [Told({"task": request["task"], "scores": dict(zip(("no", "yes"), row, strict=True))})
                for request, row in zip(requests, scores, strict=True)]  # fmt: skip


def worker(task: str, model: str | None) -> None:
    """The process of one task on the other side."""
    from pal_adapters.serving import create_app, serve

    classifier: Any = HostClassifier(task, model)  # its task is fixed, so it has neither add_task nor remove_task
    serve(create_app(classifier), port=0)


@contextmanager
def server(command: Sequence[str], threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """Starts a service and gives its address and process; ends it with SIGTERM."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *command, "--port", "0"] if "serve" in command else
                                   [sys.executable, *command], stderr=log, env=environment)  # fmt: skip
        try:
            address = None
            while address is None:
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read())
                time.sleep(0.2)
                log.seek(0)
                address = re.search(r"http://\S+", log.read())
            yield address[0], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


async def closed_loops(addresses: Mapping[str, str], clients: int, requests: int) -> dict[str, float]:
    """Requests per second and latencies in milliseconds."""
    waiting = iter(list(zip(texts(requests, seed=clients), random.Random(1).choices(TASKS, k=requests), strict=True)))
    latencies: list[float] = []

    async def client() -> None:
        # The server closes connections that were idle for five seconds.
        limits = httpx.Limits(keepalive_expiry=2)
        async with httpx.AsyncClient(timeout=None, trust_env=False, limits=limits) as http:
            for text, task in waiting:
                start = time.perf_counter()
                response = await http.post(f"{addresses[task]}/predict", json={"task": task, "text": text})
                response.raise_for_status()
                latencies.append(1000 * (time.perf_counter() - start))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    found = {f"p{level}_ms": round(float(np.percentile(latencies, level)), 1) for level in (50, 95, 99)}
    return {"requests_per_second": round(requests / seconds, 1), **found}


def load(addresses: Mapping[str, str], processes: Sequence[psutil.Process], args: Any) -> dict[str, Any]:
    asyncio.run(closed_loops(addresses, 8, 64))  # not measured
    found = {str(clients): asyncio.run(closed_loops(addresses, clients, args.requests)) for clients in args.clients}
    memory = sum(process.memory_info().rss for process in processes) / 2**20
    return {"clients": found, "memory_mib": round(memory)}


async def soak(address: str, process: psutil.Process, seconds: float, expected: Mapping[Any, float]) -> dict[str, Any]:
    """Good and bad calls side by side, then SIGTERM while calls are in progress."""
    counts = dict.fromkeys(("good", "wrong", "lost", "bad_json", "unknown_task", "too_large", "gone"), 0)
    end, memory = time.perf_counter() + seconds, [0.0, 0.0]
    stopping = asyncio.Event()
    cases = list(expected)

    async def good(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            while True:
                text, task = draw.choice(cases)
                sent_before = not stopping.is_set()
                try:
                    response = await http.post(f"{address}/predict", json={"task": task, "text": text})
                except httpx.TransportError:
                    # After SIGTERM new calls are refused; a call that was sent before is answered.
                    counts["lost"] += sent_before
                    return
                right = (
                    response.status_code == 200 and abs(response.json()["scores"]["yes"] - expected[text, task]) < 1e-4
                )
                counts["good" if right else "wrong"] += 1

    async def bad() -> None:
        host, port = address.removeprefix("http://").split(":")
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            while time.perf_counter() < end - 1:  # not when the service stops
                for name, content, status in (
                    ("bad_json", b'{"task": ', 400),
                    ("unknown_task", b'{"task": "nope", "text": "x"}', 422),
                    ("too_large", b" " * 1_100_000, 413),
                ):
                    headers = {"Content-Type": "application/json"}
                    response = await http.post(f"{address}/predict", content=content, headers=headers)
                    counts[name] += response.status_code == status
                body = json.dumps({"task": TASKS[0], "text": "x"}).encode()
                _, writer = await asyncio.open_connection(host, int(port))
                head = (
                    "POST /predict HTTP/1.1",
                    "Host: x",
                    "Content-Type: application/json",
                    f"Content-Length: {len(body)}",
                )
                writer.write("\r\n".join((*head, "", "")).encode() + body)
                await writer.drain()
                writer.close()
                counts["gone"] += 1

    async def watch() -> None:
        await asyncio.sleep(seconds / 4)
        memory[0] = process.memory_info().rss / 2**20
        await asyncio.sleep(max(0.0, end - time.perf_counter()))
        memory[1] = process.memory_info().rss / 2**20
        stopping.set()
        process.send_signal(signal.SIGTERM)

    await asyncio.gather(watch(), *(good(number) for number in range(8)), *(bad() for _ in range(2)))
    return counts | {"memory_mib_after_a_quarter": round(memory[0]), "memory_mib_at_the_end": round(memory[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", default="serve.json", help="file for the results")
    parser.add_argument("--model", help="base model (the MiniLM encoder that pip installs)")
    parser.add_argument("--requests", type=int, default=512, help="requests for each number of clients")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="numbers of clients")
    parser.add_argument("--soak", type=float, default=0, help="seconds under faults")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.model)
    cores = len(os.sched_getaffinity(0))
    results: dict[str, Any] = {"cores": cores, "tasks": len(TASKS), "requests": args.requests}
    more = [] if args.model is None else ["--model", args.model]
    with tempfile.TemporaryDirectory() as folder:
        make_folder(folder, args.model)
        command = ["-m", "pal_adapters", "serve", folder]
        with server(command, cores) as (address, process):
            results["one_process"] = load(dict.fromkeys(TASKS, address), [process], args)
        with ExitStack() as stack:
            # The processes share the cores, so each computes with one thread.
            started = [stack.enter_context(server([__file__, "--worker", task, *more], 1)) for task in TASKS]
            addresses = {task: address for task, (address, _) in zip(TASKS, started, strict=True)}
            results["process_per_task"] = load(addresses, [process for _, process in started], args)
        if args.soak:
            from pal_adapters.multitask import Predictor

            cases = [(text, task) for text in texts(40, seed=2) for task in TASKS]
            predictor = Predictor.from_pretrained(folder)
            answers = predictor([{"task": task, "text": text} for text, task in cases])
            expected = {case: answer.to_dict()["scores"]["yes"] for case, answer in zip(cases, answers, strict=True)}
            with server(command, cores) as (address, process):
                results["soak"] = {"seconds": args.soak} | asyncio.run(soak(address, process, args.soak, expected))
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
