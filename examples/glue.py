"""Trains one model on many GLUE and SuperGLUE tasks with a recipe, and writes a table and a figure.

    python examples/glue.py --preset pals --data_dir DATA --tasks all --output_dir out --max_steps 2000

`DATA` contains `<task>/train.jsonl[.gz]` and `<task>/validation.jsonl[.gz]`, or folders `glue` and `super_glue` with
such folders inside. Without `--data_dir` the data sets are loaded from the Hub. `--preset` is a recipe of
`pal_adapters.multitask.PRESETS`, or `full_single`: a fine-tuned copy of the model per task, one after the other.

A tenth of the training data selects the best checkpoint; the validation data is used only for the final scores. The
run can be killed at any time: the same command resumes it from the last checkpoint and produces the same table. Writes
`results.json`, `pareto.png` and the folder `model`; `--compare` adds the results in other folders to the figure.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from glue_picture import picture

from pal_adapters.cli.fitting import Data, held_out, predict, score, trivial
from pal_adapters.cli.main import reported
from pal_adapters.cli.options import PositiveFloat, PositiveInt, Seed, option, parse
from pal_adapters.cli.shared import load_base, load_tasks, table, versions, write_json
from pal_adapters.errors import ConfigError
from pal_adapters.multitask import EncodedTask, MultiTaskTrainer, get_preset, last_checkpoint

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
SINGLE = "full_single"
PER_RUN = ("data_dir", "output_dir", "compare")  # options that may change when a run is resumed


@dataclass
class GlueOptions:
    preset: str = option("name of a recipe, or full_single")
    output_dir: str = option("folder for checkpoints and results", aliases=["--output"])
    data_dir: str | None = option("folder with the data of named tasks (default: from the Hub)", None)
    tasks: list[str] = option("names of tasks, or folders with a task.yaml; all: eight tasks of GLUE", ["all"])
    model: str | None = option("name or folder of the base model (the MiniLM encoder that pip installs)", None)
    max_steps: PositiveInt | None = option("number of optimizer steps (the recipe's epochs)", None)
    seed: Seed = option("random seed", 42)
    host: Literal["adapters", "peft"] | None = option("library for the adapters (the first one installed)", None)
    sampling: str | None = option("sampling strategy for tasks (the recipe's)", None)
    learning_rate: PositiveFloat | None = option("peak learning rate (the recipe's)", None)
    attention_learning_rate: PositiveFloat | None = option("learning rate of the attention in PALs (the same)", None)
    adam_bias_correction: bool | None = option(
        "whether AdamW uses bias correction (the recipe's)", None, nargs="?", const=True
    )
    pooling: str | None = option("what heads read: mean, first, last or pooler (the recipe's)", None)
    hidden_size: PositiveInt | None = option("bottleneck size of the adapters (the method's default)", None)
    batch_size: PositiveInt | None = option("batch size (the recipe's)", None)
    max_length: PositiveInt | None = option("maximum number of tokens (the recipe's)", None)
    max_train_rows: PositiveInt | None = option("maximum number of training examples per task (all)", None)
    bf16: bool = option("use bfloat16 autocast", False)
    evaluations: PositiveInt = option("number of evaluations and checkpoints", 5)
    compare: list[str] = option("folders of other runs to add to the figure", [])


def split_tasks(args: GlueOptions) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    """The tasks with a held-out part of their training data, and the data for the final scores."""
    tasks, test = [], {}
    for task in load_tasks("--tasks", list(GLUE) if args.tasks == ["all"] else args.tasks, args.data_dir):
        train, dev = held_out(task, task.dataset[task.train_split], 42)
        if args.max_train_rows is not None and len(train) > args.max_train_rows:
            train = train.shuffle(seed=42, keep_in_memory=True).select(range(args.max_train_rows))
        test[task.name] = task.validation() or {task.name: dev}
        dev = dev.select(range(min(len(dev), 1000)))
        tasks.append(replace(task, dataset={"train": train, "validation": dev}, validation_splits=("validation",)))
    return tasks, test


def train_group(args: GlueOptions, tasks: list[Any], test: dict[str, Any], output: Path) -> dict[str, Any]:
    """One run: trains the tasks together, or resumes, and returns what the table needs."""
    done = output / "done.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    preset = get_preset("full" if args.preset == SINGLE else args.preset)
    base, tokenizer = load_base(args.model)
    transformers.set_seed(args.seed)
    sized = {} if args.hidden_size is None else {"hidden_size": args.hidden_size}
    model = preset.build(base, tasks, host=args.host, pooling=args.pooling, **sized)
    names = ("sampling", "learning_rate", "attention_learning_rate", "adam_bias_correction", "max_length", "max_steps")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sampling = changes.get("sampling", preset.arguments["sampling"])
    # One network for all tasks trains on mixed batches; other methods on batches of similar lengths.
    mixes = preset.adapters == "shared"
    changes |= {"mixed_batches": True} if mixes and sampling != "uncertainty" else {}
    changes |= {} if mixes or sampling == "uncertainty" else {"group_by_length": True}
    if args.batch_size is not None:
        changes["per_device_train_batch_size"] = args.batch_size
    epochs = int(preset.arguments["num_train_epochs"])
    if args.max_steps is not None:  # the recipe's schedule in fewer steps
        changes["steps_per_epoch"] = max(1, math.ceil(args.max_steps / epochs))
    part = (1 - 1e-9) / args.evaluations  # a share of the steps, rounded up by the Trainer; 1 would mean one step
    arguments = preset.training_arguments(
        str(output / "checkpoints"),
        num_tasks=len(tasks),
        seed=args.seed,
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),  # bfloat16 on a CPU needs this
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=part,
        save_steps=part,
        save_total_limit=2,
        load_best_model_at_end=True,
        logging_steps=1.0 / max(args.evaluations, 20),
        per_device_eval_batch_size=64,
        report_to=[],
        **{name: value for name, value in changes.items() if name != "seed"},
    )
    trainer = MultiTaskTrainer(model, arguments, tasks, processing_class=tokenizer, preset=preset)
    trainer.train(resume_from_checkpoint=last_checkpoint(output / "checkpoints"))
    scores, trivial_scores = {}, {}
    for task in tasks:
        parts = {**task.dataset, **test[task.name]}
        encoded = {
            key: EncodedTask(task, rows, tokenizer, arguments.max_length, where=key) for key, rows in parts.items()
        }
        data = Data(task, encoded.pop("train"), encoded.pop("validation"), encoded)
        scores |= score(data, predict(trainer, data))
        trivial_scores |= trivial(data)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    result = {
        "scores": scores,
        "baseline": trivial_scores,
        "parameters": model.count_parameters(),
        "steps": trainer.state.global_step,
        "rows": drawn(trainer, tasks),
        "dev": [e["eval_average"] for e in trainer.state.log_history if "eval_average" in e],
    }
    write_json(done, result)
    return result


def drawn(trainer: Any, tasks: list[Any]) -> dict[str, Any]:
    """How many examples were trained on and, if they were selected, from how many candidates and which tasks."""
    state, args = trainer.state, trainer.args
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    found: dict[str, Any] = {"trained": state.global_step * size, "of_one_pass": len(trainer.train_dataset)}
    log = [entry for entry in state.log_history if "candidates" in entry]
    if log:
        found["candidates"] = int(sum(entry["candidates"] for entry in log))
        found["chosen"] = {t.name: int(sum(entry[f"chosen_{t.name}"] for entry in log)) for t in tasks}
    return found


def run(args: GlueOptions) -> dict[str, Any]:
    if args.preset != SINGLE:
        get_preset(args.preset)
    tasks, test = split_tasks(args)
    names = [task.name for task in tasks]
    output = Path(args.output_dir)
    config = {name: value for name, value in vars(args).items() if name not in PER_RUN} | {"tasks": names}
    claim(output, config)
    groups = [[task] for task in tasks] if args.preset == SINGLE else [tasks]
    folders = [output / group[0].name if args.preset == SINGLE else output for group in groups]
    results = [train_group(args, group, test, folder) for group, folder in zip(groups, folders, strict=True)]
    scores, baseline = (
        {key: found for result in results for key, found in result[part].items()} for part in ("scores", "baseline")
    )
    counts = results[0]["parameters"]
    trained = sum(result["parameters"]["trainable"] for result in results)
    primary = [next(iter(scores[task.name].values())) for task in tasks]
    summary = {
        "config": config,
        "versions": versions(),
        "scores": scores,
        "baseline": baseline,
        "average": sum(primary) / len(primary),
        "steps": sum(result["steps"] for result in results),
        "rows": results[0]["rows"]
        if args.preset != SINGLE
        else {n: r["rows"] for n, r in zip(names, results, strict=True)},
        "parameters": {"base": counts["base"], "trained": trained, "trained_per_task": trained / len(tasks)},
    }
    write_json(output / "results.json", summary)
    return summary


def claim(output: Path, config: dict[str, Any]) -> None:
    """Creates the folder, or checks that it belongs to the same run."""
    path = output / "config.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = sorted(name for name in config if before.get(name) != config[name])
            if other:
                raise ConfigError(
                    f"--output_dir {output} contains a run with {other[0]} {before.get(other[0])!r}, not "
                    f"{config[other[0]]!r}: use another folder"
                )
        write_json(path, config)
    except OSError as error:
        raise ConfigError(f"--output_dir {output}: cannot be written ({error.strerror})") from error


def score_table(results: dict[str, Any]) -> str:
    rows = []
    for name, metrics in results["scores"].items():
        trivial = results["baseline"][name]
        rows += [
            (name, metric, f"{value:.4f}", "" if metric not in trivial else f"{trivial[metric]:.4f}")
            for metric, value in metrics.items()
        ]
    rows.append(("average", "first metrics", f"{results['average']:.4f}", ""))
    return table(("task", "metric", "score", "no input"), rows, left=2)


def main(argv: Sequence[str] | None = None) -> int:
    args, given = parse("glue.py", __doc__, argv, GlueOptions)
    return reported("glue.py", lambda: train(args), traceback=given.traceback)


def train(args: GlueOptions) -> int:
    results = run(args)
    picture(results, args.compare, Path(args.output_dir) / "pareto.png")
    print(score_table(results))
    counts = results["parameters"]
    print(f"\n{counts['trained']:,} parameters trained, {counts['trained_per_task']:,.0f} per task")
    print(f"written: {Path(args.output_dir) / 'results.json'} and pareto.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
