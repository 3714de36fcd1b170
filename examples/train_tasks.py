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
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import (
    InputError,
    guarded,
    load_base,
    make_folder,
    parser,
    positive_float,
    positive_int,
    seed_int,
    versions,
)
from methods import HOSTED, NETWORKS, SIZED, build, count, saves_base, trains_base

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
POOLINGS = {"mean": "mean", "cls": "first"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data_dir", help="folder with the data (the data sets of these names on the hub)")
    options.add_argument("--tasks", nargs="+", required=True, help="names of GLUE and SuperGLUE tasks")
    options.add_argument("--method", choices=METHODS, required=True, help="what is trained for a task")
    options.add_argument("--output_dir", required=True, help="folder for results.json and the adapters")
    options.add_argument(
        "--host", choices=("adapters", "peft"), help="library that holds the adapters (the first found)"
    )
    options.add_argument("--model", help="name or folder of the base (a MiniLM encoder that comes with pip)")
    options.add_argument("--joint", action="store_true", help="train the base too, with all tasks at once")
    options.add_argument(
        "--sampling", choices=("proportional", "mt_uncertainty"), help="rows of a mixed batch of ca_mtl (proportional)"
    )
    options.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="what the heads see of the tokens")
    options.add_argument("--hidden_size", type=positive_int, help="width of the adapters (the method's own)")
    options.add_argument("--epochs", type=positive_int, help="passes over the training rows (by method)")
    options.add_argument("--max_steps", type=positive_int, help="upper bound on the steps of each training run")
    options.add_argument("--learning_rate", type=positive_float, help="peak learning rate (by method)")
    options.add_argument("--batch_size", type=positive_int, default=16, help="rows of a batch")
    options.add_argument("--max_length", type=positive_int, default=128, help="tokens after which a text is cut")
    options.add_argument("--seed", type=seed_int, default=42, help="seed of everything random")
    args = options.parse_args(argv)
    if args.host is not None and args.method not in HOSTED:
        options.error(f"--host has no effect with --method {args.method}, which adds no modules; leave it out")
    if args.hidden_size is not None and args.method not in SIZED:
        options.error(f"--hidden_size has no effect with --method {args.method}; leave it out")
    if args.joint and args.method == "head":
        options.error("--joint cannot be combined with --method head, which trains nothing that tasks could share")
    if args.joint and args.method in NETWORKS:
        options.error(f"--joint has no effect with --method {args.method}, one network for all tasks; leave it out")
    if args.sampling is not None and args.method not in NETWORKS:
        options.error(
            f"--sampling has no effect with --method {args.method}, whose batches hold one task; leave it out"
        )
    if args.method in NETWORKS:
        args.sampling = args.sampling or "proportional"
    epochs, learning_rate, args.attention_factor = DEFAULTS[args.method]
    args.epochs = args.epochs or epochs
    args.learning_rate = args.learning_rate or (JOINT_LEARNING_RATE if args.joint else learning_rate)
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    import fitting

    from pal_adapters.multitask import Task, default_host

    start = time.perf_counter()
    tasks = [Task.named(name, args.data_dir, pooling=POOLINGS[args.pooling]) for name in args.tasks]
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--tasks: {twice[0]} is named twice")
    if args.host is None and args.method in HOSTED:
        args.host = default_host()
    output = make_folder("--output_dir", args.output_dir)
    base, tokenizer = load_base(args.model, args.max_length)
    parameters = dict(base.named_parameters())
    pristine = {name: tensor.clone() for name, tensor in base.state_dict().items()} if args.method == "full" else {}
    data = [fitting.encode(task, tokenizer, args.max_length, seed=args.seed) for task in tasks]
    try:
        model, sizes = build(args, base, tasks)
    except (ValueError, NotImplementedError) as error:  # such as a width that the method does not allow
        raise InputError(f"--method {args.method}: {error}") from error
    results: dict[str, Any] = {
        "config": vars(args) | {"tasks": names},
        "versions": versions(),
        "device": "",
        "parameters": count(args, model, parameters, sizes),
        "tasks": {},
    }
    together = args.joint or args.method in NETWORKS
    for group in [data] if together else [[one] for one in data]:
        began = time.perf_counter()
        if args.method == "full" and not args.joint:
            base.load_state_dict(pristine)
        model.prepare_training([one.task.name for one in group], base=trains_base(args))
        if args.method == "head":
            with fitting.frozen(base, POOLINGS[args.pooling]):
                trainer, found = fit(args, model, group, tokenizer, output)
        else:
            trainer, found = fit(args, model, group, tokenizer, output)
        results["device"] = str(model.device)
        for one in group:
            name = one.task.name
            # Of a run of several tasks, each is given an equal part of the time.
            seconds = round((time.perf_counter() - began) / len(group), 2)
            results["tasks"][name] = found[name] | {"seconds": seconds}
            fitting.save_head(model, name, output / "adapters" / name)
            if args.method == "full" and not args.joint:
                base.save_pretrained(output / "adapters" / name)
        if args.method in NETWORKS:
            results["sampling"] = sampled(trainer, results["tasks"])
    if args.method != "full" or args.joint:
        model.save_pretrained(output / "adapters")
    if saves_base(args):
        shutil.copytree(output / "adapters" / "base.model", output / "base", dirs_exist_ok=True)
    results["seconds"] = round(time.perf_counter() - start, 2)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def fit(args: argparse.Namespace, model: Any, group: list[Any], tokenizer: Any, output: Path) -> tuple[Any, Any]:
    """Trains tasks together; returns the trainer, and what it found of each task."""
    import fitting

    network = args.method in NETWORKS
    rows = sum(len(one.train) for one in group)
    sampling = "uncertainty" if args.sampling == "mt_uncertainty" else "proportional" if network else "annealed"
    options: dict[str, Any] = {"mixed_batches": sampling == "proportional"} if network else {"group_by_length": True}
    trainer = fitting.train(
        model,
        group,
        tokenizer,
        output,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        attention_factor=args.attention_factor,
        batch_size=args.batch_size,
        max_steps=args.max_steps,
        seed=args.seed,
        sampling=sampling,
        steps_per_epoch=-(-rows // args.batch_size) if network else None,
        **options,
    )
    found = {one.task.name: fitting.summary(trainer, one) for one in group}
    for one in group if not network else ():
        found[one.task.name]["steps"] = trainer.draws()[one.task.name]
    return trainer, found


def sampled(trainer: Any, tasks: dict[str, Any]) -> dict[str, int]:
    """How many rows the network was trained on, of each task too, and among how many they were chosen."""
    steps, one_pass = trainer.state.global_step, len(trainer.train_dataset)
    log = [entry for entry in trainer.state.log_history if "candidates" in entry]
    drawn = {name: int(sum(e[f"chosen_{name}"] for e in log)) for name in tasks} if log else trainer.draws()
    for name, task in tasks.items():
        task |= {"rows_drawn": drawn[name], "share_of_own_rows": drawn[name] / task["rows"]["train"]}
    return {
        "updates": steps,
        "rows_trained": sum(drawn.values()),
        "rows_of_one_pass": one_pass,
        "candidates_forward": int(sum(entry["candidates"] for entry in log)),
    }


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


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    results = guarded("train_tasks.py", lambda: run(args))
    if results is None:
        return 1
    print(table(results))
    base = results["parameters"]
    print(f"\nbase: {base['base_total']:,} parameters, {base['base_trained']:,} of them trained")
    print(f"written: {Path(args.output_dir) / 'results.json'} and {Path(args.output_dir) / 'adapters'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
