"""Trains an adapter per task on one shared base, for GLUE and SuperGLUE tasks, and scores them.

    python examples/train_tasks.py --data_dir DATA --tasks rte mrpc stsb --method pal --output_dir out

`DATA` contains `<task>/train.jsonl[.gz]` and `<task>/validation.jsonl[.gz]`, or folders `glue` and `super_glue` with
such folders inside. Without `--data_dir` the data sets of these names are loaded from the Hub. Each task gets its own
adapter and linear head; the base is frozen. With `--joint` the base trains too, together with the adapters of all
tasks, as in the PALs paper. `--method full` fine-tunes a copy of the base per task and `--method head` trains only a
head: the two extremes. `--method ca_mtl_base` trains one network for all tasks on mixed batches; with
`--sampling mt_uncertainty`, on the examples it is least certain about.

A tenth of the training data selects the best epoch. The validation data is used only for the final scores. Writes
`results.json` and the folder `adapters`, with one folder per task.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import (
    InputError,
    aligned,
    guarded,
    load_base,
    make_folder,
    named_once,
    parser,
    positive_float,
    positive_int,
    seed_int,
    versions,
    write_json,
)
from methods import HOSTED, NETWORKS, SIZED, build, count, saves_base, trains_base

# For each method: epochs, learning rate, and its factor for the attention in PALs.
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
    options.add_argument("--data_dir", help="folder with the data (default: from the Hub)")
    options.add_argument("--tasks", nargs="+", required=True, help="names of GLUE and SuperGLUE tasks")
    options.add_argument("--method", choices=METHODS, required=True, help="what is trained for each task")
    options.add_argument("--output_dir", required=True, help="folder for results.json and the adapters")
    options.add_argument(
        "--host", choices=("adapters", "peft"), help="library for the adapters (the first one installed)"
    )
    options.add_argument("--model", help="name or folder of the base model (the MiniLM encoder that pip installs)")
    options.add_argument("--joint", action="store_true", help="train the base too, with all tasks together")
    options.add_argument(
        "--sampling",
        choices=("proportional", "mt_uncertainty"),
        help="how ca_mtl samples mixed batches (proportional)",
    )
    options.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="how heads pool the tokens")
    options.add_argument(
        "--hidden_size", type=positive_int, help="bottleneck size of the adapters (the method's default)"
    )
    options.add_argument("--epochs", type=positive_int, help="number of epochs (by method)")
    options.add_argument("--max_steps", type=positive_int, help="maximum number of steps of each training run")
    options.add_argument("--learning_rate", type=positive_float, help="peak learning rate (by method)")
    options.add_argument("--batch_size", type=positive_int, default=16, help="batch size")
    options.add_argument(
        "--max_length", type=positive_int, default=128, help="maximum number of tokens; longer texts are truncated"
    )
    options.add_argument("--seed", type=seed_int, default=42, help="random seed")
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
    named_once("--tasks", names)
    if args.host is None and args.method in HOSTED:
        args.host = default_host()
    output = make_folder("--output_dir", args.output_dir)
    base, tokenizer = load_base(args.model, args.max_length)
    parameters = dict(base.named_parameters())
    pristine = {name: tensor.clone() for name, tensor in base.state_dict().items()} if args.method == "full" else {}
    data = [fitting.encode(task, tokenizer, args.max_length, seed=args.seed) for task in tasks]
    try:
        model, sizes = build(args, base, tasks)
    except (ValueError, NotImplementedError) as error:  # such as a size that the method does not allow
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
            # Tasks that train together share the time equally.
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
    write_json(output / "results.json", results)
    return results


def fit(args: argparse.Namespace, model: Any, group: list[Any], tokenizer: Any, output: Path) -> tuple[Any, Any]:
    """Trains tasks together; returns the trainer and the results of each task."""
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
    """How many examples the network was trained on, per task and in total, and from how many candidates."""
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
    return "\n".join(aligned(rows, left=3))


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
