"""Trains an adapter per task on one shared base model, and scores the tasks.

A task is the name of a GLUE or SuperGLUE task, or a folder with `task.yaml` and its data (see `Task.from_folder`).
The data of named tasks is in `--data_dir`, as `<task>/train.jsonl[.gz]` and `<task>/validation.jsonl[.gz]`, or in
folders `glue` and `super_glue` of such folders; without `--data_dir` it is loaded from the Hub. Each task gets its own
adapter and linear head; the base is frozen. With `--joint` the base trains too, together with the adapters of all
tasks, as in the PALs paper. `--method full` fine-tunes a copy of the base per task and `--method head` trains only a
head: the two extremes. `--method ca_mtl_base` trains one network for all tasks on mixed batches; with
`--sampling mt_uncertainty`, on the examples it is least certain about.

A tenth of the training data selects the best epoch. The validation data is used only for the final scores. Writes
`results.json` and the folder `adapters`, which `pal-adapters predict` and `serve` read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import default_host

from . import fitting
from .methods import HOSTED, NETWORKS, SIZED, base_is_trained, build, count, saves_base
from .options import PositiveFloat, PositiveInt, Seed, fill_in, option, parse
from .shared import POOLINGS, described, load_base, load_tasks, make_folder, table, versions, write_json

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


@dataclass
class TrainOptions:
    """The options of `train`. Those that depend on the method are filled in from `DEFAULTS`."""

    tasks: list[str] = option("names of GLUE and SuperGLUE tasks, or folders with a task.yaml")
    method: str = option("what is trained for each task", choices=tuple(DEFAULTS))
    output_dir: str = option("folder for results.json and the adapters", aliases=["--output"])
    data_dir: str | None = option("folder with the data of named tasks (default: from the Hub)", None)
    host: Literal["adapters", "peft"] | None = option("library for the adapters (the first one installed)", None)
    model: str | None = option("name or folder of the base model (the MiniLM encoder that pip installs)", None)
    joint: bool = option("train the base too, with all tasks together", False)
    sampling: Literal["proportional", "mt_uncertainty"] | None = option(
        "how ca_mtl samples mixed batches (proportional)", None
    )
    pooling: Literal["mean", "cls"] = option("how heads pool the tokens", "mean")
    hidden_size: PositiveInt | None = option("bottleneck size of the adapters (the method's default)", None)
    epochs: PositiveInt | None = option("number of epochs (by method)", None)
    max_steps: PositiveInt | None = option("maximum number of steps of each training run", None)
    learning_rate: PositiveFloat | None = option("peak learning rate (by method)", None)
    batch_size: PositiveInt = option("batch size", 16)
    max_length: PositiveInt = option("maximum number of tokens; longer texts are truncated", 128)
    seed: Seed = option("random seed", 42)

    def __post_init__(self) -> None:
        if self.host is not None and self.method not in HOSTED:
            raise ConfigError(f"--host has no effect with --method {self.method}, which adds no modules; leave it out")
        if self.hidden_size is not None and self.method not in SIZED:
            raise ConfigError(f"--hidden_size has no effect with --method {self.method}; leave it out")
        if self.joint and self.method == "head":
            raise ConfigError(
                "--joint cannot be combined with --method head, which trains nothing that tasks could share"
            )
        if self.joint and self.method in NETWORKS:
            raise ConfigError(
                f"--joint has no effect with --method {self.method}, one network for all tasks; leave it out"
            )
        if self.sampling is not None and self.method not in NETWORKS:
            raise ConfigError(
                f"--sampling has no effect with --method {self.method}, whose batches hold one task; leave it out"
            )
        epochs, learning_rate, self.attention_factor = DEFAULTS[self.method]
        fill_in(self, epochs=epochs, learning_rate=JOINT_LEARNING_RATE if self.joint else learning_rate)
        if self.method in NETWORKS:
            fill_in(self, sampling="proportional")
        if self.method in HOSTED:
            fill_in(self, host=default_host())


def run(args: Any) -> dict[str, Any]:
    """Trains and scores the tasks, and writes the folder; returns the results."""
    start = time.perf_counter()
    tasks = load_tasks("--tasks", args.tasks, args.data_dir, pooling=POOLINGS[args.pooling])
    names = [task.name for task in tasks]
    output = make_folder("--output_dir", args.output_dir)
    base, tokenizer = load_base(args.model, args.max_length)
    parameters = dict(base.named_parameters())
    pristine = {name: tensor.clone() for name, tensor in base.state_dict().items()} if args.method == "full" else {}
    data = [fitting.encode(task, tokenizer, args.max_length, seed=args.seed) for task in tasks]
    try:
        model, sizes = build(args, base, tasks)
    except (ValueError, NotImplementedError) as error:  # such as a size that the method does not allow
        raise ConfigError(f"--method {args.method}: {error}") from error
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
        model.prepare_training([one.task.name for one in group], base=base_is_trained(args))
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
        model.save_pretrained(
            output / "adapters",
            processing_class=tokenizer,
            tasks=[described(one.task, args.max_length, results["tasks"][one.task.name]) for one in data],
        )
    if saves_base(args):
        shutil.copytree(output / "adapters" / "base.model", output / "base", dirs_exist_ok=True)
    results["seconds"] = round(time.perf_counter() - start, 2)
    write_json(output / "results.json", results)
    return results


def fit(args: Any, model: Any, group: list[Any], tokenizer: Any, output: Path) -> tuple[Any, Any]:
    """Trains tasks together; returns the trainer and the results of each task."""
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


def score_table(results: dict[str, Any]) -> str:
    """The scores as a table."""
    head, rows = ("task", "split", "metric", "trivial", "score", "trained", "of base", "seconds"), []
    for name, task in results["tasks"].items():
        count = results["parameters"]["tasks"][name]
        for split, metrics in task["metrics"].items():
            for metric, value in metrics.items():
                trivial = task["baseline"][split].get(metric)
                share, seconds = f"{100 * count['share_of_base']:.2f} %", f"{task['seconds']:.0f}"
                size = f"{count['trainable']:,}"
                rows.append(
                    (
                        name,
                        split,
                        metric,
                        "" if trivial is None else f"{trivial:.4f}",
                        f"{value:.4f}",
                        size,
                        share,
                        seconds,
                    )
                )
    return table(head, rows, left=3)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    args, _ = parse("pal-adapters train", __doc__, argv, TrainOptions)
    results = run(args)
    print(score_table(results))
    base = results["parameters"]
    print(f"\nbase: {base['base_total']:,} parameters, {base['base_trained']:,} of them trained")
    print(f"written: {Path(args.output_dir) / 'results.json'} and {Path(args.output_dir) / 'adapters'}")
    return 0
