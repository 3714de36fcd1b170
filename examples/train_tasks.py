"""Trains an adapter for each of several GLUE and SuperGLUE tasks on one shared base, and scores them.

    python examples/train_tasks.py --data_dir DATA --tasks rte mrpc stsb --method pal --output_dir out

`DATA` holds `<task>/train.jsonl[.gz]` and `<task>/validation.jsonl[.gz]`, or folders `glue` and `super_glue` with
such folders inside; without `--data_dir` the data sets of these names come from the hub. Every task gets an adapter
and a linear head of its own; the base is frozen. With `--joint` the base is trained as well, with the adapters of all
tasks at once, as in the paper on PALs. `--method full` trains a copy of the base for every task, and `--method head`
only a head: the two ends of the scale. `--method ca_mtl_base` trains one network for all tasks on batches that mix
them, `--sampling mt_uncertainty` on the rows about which it is least certain.

The best epoch is chosen on a tenth of the training rows. The validation rows are used once, for the scores at the end.
Writes `results.json` and the folder `adapters`, with one folder for each task.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

# For each method: epochs, learning rate, and the factor on it for the attention of a PAL.
DEFAULTS = {
    "pal": (5, 1e-3, 5.0),
    "low_rank": (5, 1e-3, 1.0),
    "top_attention": (5, 1e-3, 1.0),
    "lhuc": (5, 1e-2, 1.0),
    "houlsby": (5, 1e-3, 1.0),
    "houlsby_pal": (5, 1e-3, 5.0),
    "ca_mtl_base": (5, 1e-4, 1.0),
    "ca_mtl_large": (5, 1e-4, 1.0),
    "full": (5, 1e-4, 1.0),
    "head": (30, 1e-2, 1.0),
}
JOINT_LEARNING_RATE = 1e-4
METHODS = tuple(DEFAULTS)
SIZED = ("pal", "low_rank", "top_attention", "houlsby", "houlsby_pal")
NETWORKS = ("ca_mtl_base", "ca_mtl_large")
HOSTED = (*SIZED, "lhuc", *NETWORKS)


class InputError(Exception):
    """What the user asked for cannot be done; the message is one line."""


class Parser(argparse.ArgumentParser):
    """Ends with one line, where the standard parser prints the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data_dir", help="folder with the data (the data sets of these names on the hub)")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of GLUE and SuperGLUE tasks")
    parser.add_argument("--method", choices=METHODS, required=True, help="what is trained for a task")
    parser.add_argument("--output_dir", required=True, help="folder for results.json and the adapters")
    parser.add_argument(
        "--host", choices=("adapters", "peft"), help="library that holds the adapters (the first found)"
    )
    parser.add_argument("--model", help="name or folder of the base (a MiniLM encoder that comes with pip)")
    parser.add_argument("--joint", action="store_true", help="train the base too, with all tasks at once")
    parser.add_argument(
        "--sampling", choices=("proportional", "mt_uncertainty"), help="rows of a mixed batch of ca_mtl (proportional)"
    )
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="what the heads see of the tokens")
    parser.add_argument("--hidden_size", type=positive_int, help="width of the adapters (the method's own)")
    parser.add_argument("--epochs", type=positive_int, help="passes over the training rows (by method)")
    parser.add_argument("--max_steps", type=positive_int, help="upper bound on the steps of each training run")
    parser.add_argument("--learning_rate", type=positive_float, help="peak learning rate (by method)")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="rows of a batch")
    parser.add_argument("--max_length", type=positive_int, default=128, help="tokens after which a text is cut")
    parser.add_argument("--seed", type=seed_int, default=42, help="seed of everything random")
    args = parser.parse_args(argv)
    if args.host is not None and args.method not in HOSTED:
        parser.error(f"--host has no effect with --method {args.method}, which adds no modules; leave it out")
    if args.hidden_size is not None and args.method not in SIZED:
        parser.error(f"--hidden_size has no effect with --method {args.method}; leave it out")
    if args.joint and args.method == "head":
        parser.error("--joint cannot be combined with --method head, which trains nothing that tasks could share")
    if args.joint and args.method in NETWORKS:
        parser.error(f"--joint has no effect with --method {args.method}, one network for all tasks; leave it out")
    if args.sampling is not None and args.method not in NETWORKS:
        parser.error(
            f"--sampling has no effect with --method {args.method}, whose batches hold one task; leave it out"
        )
    if args.method in NETWORKS:
        args.sampling = args.sampling or "proportional"
    epochs, learning_rate, args.attention_factor = DEFAULTS[args.method]
    args.epochs = args.epochs or epochs
    args.learning_rate = args.learning_rate or (JOINT_LEARNING_RATE if args.joint else learning_rate)
    return args


def positive_int(text: str) -> int:
    return _number(text, int, "an integer of at least 1", lambda value: value >= 1)


def seed_int(text: str) -> int:
    return _number(text, int, "an integer from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def positive_float(text: str) -> float:
    return _number(text, float, "a number above 0", lambda value: 0 < value < float("inf"))


def _number(text: str, kind: Any, allowed: str, fits: Any) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {allowed}")
    return value


def load_base(name: str | None, max_length: int) -> tuple[Any, Any]:
    """The base model and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from pal_adapters.multitask import default_model

    transformers_logging.disable_progress_bar()  # transformers 5 shows one while it loads

    name = name or default_model()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModel.from_pretrained(name)
    except Exception as error:  # hosts raise OSError, ValueError, KeyError and more, with many lines
        raise InputError(f"--model {name}: cannot be loaded ({first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no padding token")
    if base.config.is_encoder_decoder:
        raise InputError(f"--model {name}: it has an encoder and a decoder; use a model with one of them")
    longest = min(tokenizer.model_max_length, getattr(base.config, "max_position_embeddings", None) or 10**9)
    shortest = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if not shortest <= max_length <= longest:
        raise InputError(f"--max_length {max_length}: allowed for this model: {shortest} to {longest}")
    return base, tokenizer


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    from pal_adapters.multitask import (
        BatchMaker,
        MultiTaskModel,
        TaskData,
        TrainingConfig,
        baseline,
        default_host,
        encode_rows,
        fit,
        load_task,
        precompute,
        predict,
        primary_metric,
        score,
        train_dev_split,
    )

    start = time.perf_counter()
    loaded = [load_task(name, args.data_dir) for name in args.tasks]
    names = [spec.name for spec, _ in loaded]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--tasks: {twice[0]} is named twice")
    if args.host is None and args.method in HOSTED:
        args.host = default_host()
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {output}: cannot be made ({error.strerror})") from error
    base, tokenizer = load_base(args.model, args.max_length)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    pristine = {name: tensor.clone() for name, tensor in base.state_dict().items()} if args.method == "full" else {}

    tasks = []
    for spec, splits in loaded:
        train, dev = train_dev_split(splits["train"], seed=args.seed, split_columns=spec.split_columns)
        encoded = [encode_rows(spec, rows, tokenizer, args.max_length) for rows in (train, dev)]
        test = {
            name: encode_rows(spec, splits[name], tokenizer, args.max_length) for name in splits if name != "train"
        }
        tasks.append(TaskData(spec, encoded[0], encoded[1], test))

    if args.method in NETWORKS:
        results = run_network(args, base, tokenizer, tasks)
        results["seconds"] = round(time.perf_counter() - start, 2)
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        return results
    try:
        model = MultiTaskModel(
            base,
            method=args.method,
            host=args.host,
            hidden_size=args.hidden_size,
            joint=args.joint,
            pooling=args.pooling,
        )
        for task in tasks:
            # A task's result does not depend on the tasks before it. Together they should not start alike.
            transformers.set_seed(args.seed + (len(model.heads) if args.joint else 0))
            model.add_task(task.spec)
    except (ValueError, NotImplementedError) as error:  # such as a width that the method does not allow
        raise InputError(f"--method {args.method}: {error}") from error
    batches = BatchMaker(tokenizer, model.device)
    config = TrainingConfig(
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        attention_factor=args.attention_factor,
        batch_size=args.batch_size,
        max_steps=args.max_steps,
        seed=args.seed,
    )

    results: dict[str, Any] = {
        "config": vars(args) | {"tasks": names},
        "versions": versions(),
        "device": str(model.device),
        "parameters": {
            "base_total": model.base_total,
            "base_trained": model.base_trained,
            "tasks": {name: model.count(name) for name in names},
        },
        "tasks": {},
    }
    runs = [tasks] if args.joint else [[task] for task in tasks]
    for group in runs:
        began = time.perf_counter()
        if args.method == "full" and not args.joint:
            base.load_state_dict(pristine)
        if args.method == "head":
            group = [precompute(model, task, batches) for task in group]
        done = fit(model, group, config, batches)
        trained = time.perf_counter() - began
        for task in group:
            began, name = time.perf_counter(), task.spec.name
            metrics, trivial = {}, {}
            for split, rows in task.test.items():
                metrics[split] = score(task.spec, rows, predict(model, task.spec, rows, batches))
                trivial[split] = baseline(task.spec, task.train, rows)
            model.save_task(name, output / "adapters")
            results["tasks"][name] = {
                "benchmark": task.spec.benchmark,
                "rows": {"train": len(task.train), "dev": len(task.dev)} | {s: len(r) for s, r in task.test.items()},
                "primary_metric": primary_metric(task.spec),
                "metrics": metrics,
                "baseline": trivial,
                "dev_history": [scores[name] for scores in done.history],
                "best_epoch": done.best_epoch,
                "steps": done.draws[name],
                # Of a joint run, each task is given an equal part of the time.
                "seconds": round(trained / len(group) + time.perf_counter() - began, 2),
            }
    if model.needs_saved_base:
        model.save_base(output / "base")
    results["seconds"] = round(time.perf_counter() - start, 2)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def run_network(args: argparse.Namespace, base: Any, tokenizer: Any, tasks: list[Any]) -> dict[str, Any]:
    """One network for all tasks, trained on batches that mix them."""
    import transformers

    from pal_adapters.multitask import (
        BatchMaker,
        NetworkModel,
        TrainingConfig,
        UncertaintySampler,
        baseline,
        fit_network,
        predict,
        primary_metric,
        score,
    )

    names = [task.spec.name for task in tasks]
    transformers.set_seed(args.seed)
    try:
        model: Any = NetworkModel(
            base,
            [task.spec for task in tasks],
            network=args.method,
            host=args.host,
            max_length=args.max_length,
            pooling=args.pooling,
        )
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"--method {args.method}: {error}") from error
    batches = BatchMaker(tokenizer, model.device)
    config = TrainingConfig(
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        max_steps=args.max_steps,
        seed=args.seed,
    )
    sampler = UncertaintySampler() if args.sampling == "mt_uncertainty" else None
    done = fit_network(model, tasks, config, batches, sampling=args.sampling, sampler=sampler)
    model.save(Path(args.output_dir) / "adapters")
    results: dict[str, Any] = {
        "config": vars(args) | {"tasks": names},
        "versions": versions(),
        "device": str(model.device),
        "parameters": {
            "base_total": model.size.base,
            "base_trained": model.size.trained_base,
            "network": model.size.added,
            "tasks": {},
        },
        "sampling": {
            "updates": done.steps,
            "rows_trained": sum(done.draws.values()),
            "rows_of_one_pass": sum(len(task.train) for task in tasks),
            "candidates_forward": sampler.forward_rows if sampler else 0,
        },
        "tasks": {},
    }
    for task in tasks:
        began, name = time.perf_counter(), task.spec.name
        head = sum(p.numel() for p in model.heads[name].parameters())
        own = model.size.per_task + head
        results["parameters"]["tasks"][name] = {
            "adapter": model.size.per_task,
            "head": head,
            "trainable": own,
            "share_of_base": own / model.size.base,
        }
        metrics, trivial = {}, {}
        for split, rows in task.test.items():
            metrics[split] = score(task.spec, rows, predict(model, task.spec, rows, batches))
            trivial[split] = baseline(task.spec, task.train, rows)
        results["tasks"][name] = {
            "benchmark": task.spec.benchmark,
            "rows": {"train": len(task.train), "dev": len(task.dev)} | {s: len(r) for s, r in task.test.items()},
            "primary_metric": primary_metric(task.spec),
            "metrics": metrics,
            "baseline": trivial,
            "dev_history": [scores[name] for scores in done.history],
            "best_epoch": done.best_epoch,
            "rows_drawn": done.draws[name],
            "share_of_own_rows": done.draws[name] / len(task.train),
            "seconds": round(done.seconds / len(tasks) + time.perf_counter() - began, 2),
        }
    return results


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "adapters", "peft", "datasets", "evaluate", "pal-adapters"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(results: dict[str, Any]) -> str:
    rows = [("task", "split", "metric", "trivial", "score", "trained", "of base", "seconds")]
    for name, task in results["tasks"].items():
        count = results["parameters"]["tasks"][name]
        for split, metrics in task["metrics"].items():
            for metric, value in metrics.items():
                trivial = task["baseline"][split][metric]
                share, seconds = f"{100 * count['share_of_base']:.2f} %", f"{task['seconds']:.0f}"
                size = f"{count['trainable']:,}"
                rows.append((name, split, metric, f"{trivial:.4f}", f"{value:.4f}", size, share, seconds))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(left + right))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # This host warns that no adapter is active while it activates the first one.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    try:
        from pal_adapters.errors import PalAdaptersError

        results = run(args)
    except ImportError as error:
        print(f"train_tasks.py: error: {error}; pip install 'pal-adapters[all]'", file=sys.stderr)
        return 1
    except (InputError, PalAdaptersError) as error:
        print(f"train_tasks.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(table(results))
    base = results["parameters"]
    print(f"\nbase: {base['base_total']:,} parameters, {base['base_trained']:,} of them trained")
    print(f"written: {Path(args.output_dir) / 'results.json'} and {Path(args.output_dir) / 'adapters'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
