"""The model card of a model of many tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal_adapters.multitask.model.routes import adapter_config, adapters_in

if TYPE_CHECKING:
    from .trainer import MultiTaskTrainer

_SPEED = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def write_model_card(trainer: MultiTaskTrainer, given: dict[str, Any]) -> None:
    """Writes `README.md` into the output folder of a trainer.

    Args:
        trainer: The trainer; its last evaluation gives the results.
        given: What `Trainer.push_to_hub` knows: `model_name`, `license`, `language`, `tags`.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    args = trainer.args
    counts = model.count_parameters()
    base = model.config._name_or_path or type(model.backbone).__name__
    tags = [
        *([given["tags"]] if isinstance(given.get("tags"), str) else given.get("tags") or []),
        "multi-task",
        "adapters",
    ]
    head: dict[str, Any] = {"tags": sorted(set(tags)), "library_name": "pal-adapters"}
    head |= {name: given[name] for name in ("license", "language") if given.get(name)}
    if base and not Path(base).exists():
        head["base_model"] = base
    rows, results = ["| task | kind | training rows | adapter | weight |", "|---|---|---|---|---|"], []
    trained: Any = trainer.train_dataset
    sizes = {rows.task.name: len(rows) for rows in trained.tasks}
    for name, task in trainer.tasks.items():
        route = model.routes[name]
        rows.append(f"| {name} | {task.kind} | {sizes[name]:,} | {route.adapter or 'none'} | {route.weight:g} |")
    adapters = sorted({name for route in model.routes.values() for name in adapters_in(route.adapter)})
    methods = sorted({type(adapter_config(model.backbone, name)).__name__ for name in adapters})
    scored = next((entry for entry in reversed(trainer.state.log_history) if "eval_average" in entry), {})
    evaluated: Any = trainer.eval_dataset or {}
    for entry, value in scored.items():
        if entry in _SPEED:
            continue
        keys = [key for key in evaluated if entry.startswith(f"eval_{key}_")]
        key = max(keys, key=len, default="")  # a task may be called as another one and its metric begin
        name = entry.removeprefix(f"eval_{key}_")
        if keys and name != "loss":
            results.append(f"| {key} | {name} | {value:.4f} |")
    if scored:
        own = trainer.aggregate
        aggregate = trainer.args.eval_aggregate if own is None else getattr(own, "__name__", type(own).__name__)
        results.append(f"| all | {aggregate} of the first metrics | {scored['eval_average']:.4f} |")
    strategy = getattr(trainer.strategy, "__name__", str(trainer.strategy))
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),
        "---",
        "",
        f"# {given.get('model_name') or Path(str(trainer.args.output_dir)).name}",
        "",
        f"One model for {len(rows) - 2} tasks, on `{Path(base).name if Path(base).exists() else base}`.",
        "",
        "## Tasks",
        "",
        *rows,
        "",
        "## Training",
        "",
        f"- method: {', '.join(methods) or 'no adapters'}; base {'trained' if model.base_trained else 'frozen'}",
        f"- sampling: {strategy}, {'mixed batches' if args.mixed_batches else 'one task a batch'}",
        f"- parameters: {counts['base']:,} of the base, {counts['adapters']:,} of adapters, "
        f"{counts['heads']:,} of heads; {counts['trainable']:,} trained",
        f"- {trainer.state.global_step:,} steps of {args.train_batch_size * args.world_size} rows × "
        f"{args.gradient_accumulation_steps}, learning rate {args.learning_rate:g}, seed {args.seed}",
        "",
        "## Results",
        "",
        *(["| evaluation set | metric | score |", "|---|---|---|", *results] if results else ["Not evaluated."]),
        "",
        "## Use",
        "",
        "```python",
        *_usage(trainer, given.get("model_name")),
        "```",
        "",
    ]
    path = Path(str(trainer.args.output_dir)) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def _usage(trainer: MultiTaskTrainer, model_name: str | None) -> list[str]:
    """Code that reads the model and runs its first task."""
    args = trainer.args
    # Only the hub knows whose repository it is, where `hub_model_id` has no owner.
    place = trainer.hub_model_id or args.hub_model_id or model_name or Path(str(args.output_dir)).name
    task = next(iter(trainer.tasks.values()))
    texts = ['"..."'] * min(len(task.text_columns), 2)
    if task.num_choices > 1:
        texts = [f"[{', '.join([text] * task.num_choices)}]" for text in texts]
    return [
        "from transformers import AutoTokenizer",
        "",
        "from pal_adapters.multitask import TaskHeads",
        "",
        f"place = {json.dumps(place)}",
        "model = TaskHeads.from_pretrained(place)",
        "tokenizer = AutoTokenizer.from_pretrained(place)",
        f'inputs = tokenizer({", ".join(texts)}, return_tensors="pt")',
        f"logits = model(task_ids={json.dumps(task.name)}, **inputs).logits[{json.dumps(task.name)}]",
    ]
