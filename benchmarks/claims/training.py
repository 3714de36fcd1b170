"""Trains one piece with `MultiTaskTrainer` and returns what verdicts and tables need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pal_adapters import transfer_report
from pal_adapters.cli import fitting
from pal_adapters.cli.shared import load_base, load_tasks, versions
from pal_adapters.cli.train import sampled

from .data import prepare
from .pieces import Result, key_of
from .recipes import RECIPES, build, build_combination, build_source


def fingerprint(model: str | None) -> dict[str, Any]:
    """What tells base models apart, wherever they are stored: their architecture and a hash of their weights."""
    base, _ = load_base(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    config = base.config
    return {
        "architecture": type(base).__name__,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "parameters": fitting.size(base),
        "weights": digest.hexdigest()[:12],
    }


class Training:
    """What all pieces share.

    Args:
        model: Name or folder of the base model.
        data_dir: Folder with the data.
        device: `"cpu"` or `"cuda"`.
        folder: Where sources and checkpoints go.
    """

    def __init__(self, model: str | None, data_dir: str | None, device: str, folder: Path) -> None:
        self._model = model
        self._data_dir = data_dir
        self._cpu = device == "cpu"
        self._folder = folder
        self._digests: dict[str, str] = {}

    def digest(self, name: str) -> str:
        """A hash of a task's examples, wherever they are stored."""
        if name not in self._digests:
            (task,) = load_tasks("--tasks", [name], self._data_dir)
            splits = (task.train_split, task.validation_splits[0])
            content = json.dumps([task.dataset[split][:] for split in splits if split in task.dataset])
            self._digests[name] = hashlib.sha256(content.encode()).hexdigest()[:12]
        return self._digests[name]

    def sources(self, settings: dict[str, Any]) -> Path:
        """The folder of a source's adapter. Sources that differ in nothing but their task are beside each other."""
        common = {name: value for name, value in settings.items() if name not in ("tasks", "data", "learning_rate")}
        return self._folder / f"sources-{key_of(common)}"

    def run(self, settings: dict[str, Any], sources: Sequence[dict[str, Any]] = ()) -> Result:
        """Trains a piece; for a combination, `sources` are the settings of its sources."""
        name = settings["recipe"]
        recipe = RECIPES[name]
        base, tokenizer = load_base(self._model, settings["max_length"])
        tasks = load_tasks("--tasks", settings["tasks"], self._data_dir, pooling=settings["pooling"])
        data = [prepare(task, tokenizer, settings, scored=name != "source") for task in tasks]
        transformers.set_seed(settings["seed"])
        setup = None
        if name == "source":
            folder = self.sources(settings)
            model, calls, setup = build_source(base, tasks[0], settings["host"], folder)
        elif recipe.combination is not None:
            folder = self.sources(sources[0])
            names = [one["tasks"][0] for one in sources]
            model, calls, setup = build_combination(
                base, tasks[0], settings["host"], folder, names, recipe.combination
            )
        else:
            model = build(name, base, tasks, settings["host"], settings["pooling"])
        counts = model.count_parameters()
        self._folder.mkdir(parents=True, exist_ok=True)
        trainer = fitting.train(
            model,
            data,
            tokenizer,
            self._folder,
            epochs=settings["max_evaluations"],
            steps_per_epoch=settings["evaluate_every"] * len(tasks),  # as many as with a model per task
            learning_rate=settings["learning_rate"],
            batch_size=settings["batch_size"],
            patience=settings["patience"],
            seed=settings["seed"],
            weight_decay=0.0 if recipe.preset is None else 0.01,
            bf16=settings["bf16"],
            use_cpu=self._cpu,
            **recipe.training,
        )
        if name == "source":
            place = folder / tasks[0].name
            place.mkdir(parents=True, exist_ok=True)
            calls.save(setup, place)
        scores = {one.task.name: scored(one, fitting.predict(trainer, one)[one.task.name]) for one in data}
        history = [entry["eval_average"] for entry in trainer.state.log_history if "eval_average" in entry]
        result: Result = {
            "tasks": scores,
            "dev": max(history),
            "dev_history": history,
            "steps": trainer.state.global_step,
            "best_step": trainer.state.best_global_step,
            "parameters": counts | {"trained": counts["trainable"] - counts["heads"]},
            "versions": versions(),
            "device": str(model.device),
        }
        if recipe.preset is not None and len(tasks) > 1:
            result["examples"] = sampled(trainer, scores)
        if recipe.combination is not None:
            batches = trainer.get_eval_dataloader(data[0].dev) if recipe.combination == "fusion" else None
            result["transfer"] = measured(calls.model, setup, batches)
        return result


def scored(data: Any, logits: np.ndarray) -> dict[str, Any]:
    """The score of a task, that of ignoring the input, and the predictions from which errors are computed."""
    rows = data.test[data.task.name]
    found = rows.score(logits)
    metric = next(iter(found))
    return {
        "metric": metric,
        "score": found[metric],
        "trivial": fitting.trivial(data)[data.task.name].get(metric),
        "rows": {"train": len(data.train), "dev": len(data.dev), "scored": len(rows)},
        "predictions": np.round(rows.predictions(logits), 6).tolist(),
        "labels": np.round(rows.labels, 6).tolist(),
    }


def measured(model: Any, setup: Any, batches: Any) -> dict[str, Any]:
    """How much each source counts in each block, and how far that is from the start."""
    inputs = batches and [{n: t for n, t in b.items() if isinstance(t, torch.Tensor)} for b in batches]
    table = transfer_report(model, setup, data=inputs)
    found: dict[str, Any] = json.loads(json.dumps(table.to_dict()))
    if table.start is not None:
        moved = [abs(value - table.start) for row in table.values for value in row if value is not None]
        found |= {"moved_mean": float(np.mean(moved)), "moved_most": float(max(moved))}
    return found
