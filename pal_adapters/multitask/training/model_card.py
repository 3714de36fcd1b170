"""The model card of a run, filled in from `model_card_template.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pal_adapters.errors import how_to_install
from pal_adapters.multitask.model.files import replace_text
from pal_adapters.multitask.model.routes import adapter_config, adapter_host, adapters_in
from pal_adapters.multitask.model.task_description import COLUMNS, TaskDescription
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.model.tasks_file import package_versions
from pal_adapters.multitask.tasks.task import Task

from .described import described_run, scores_by_set

TEMPLATE = Path(__file__).with_name("model_card_template.md")
_HUB_TASKS = {
    "token_tagging": "token-classification",
    "span_qa": "question-answering",
    "multiple_choice": "multiple-choice",
    "language_modeling": "text-generation",
}


class TrainerRun(Protocol):
    """The attributes of a trainer that its model card reads."""

    args: Any
    accelerator: Any
    model: Any
    tasks: dict[str, Task]
    train_dataset: Any
    eval_dataset: Any
    scored: Any
    state: Any
    strategy: Any
    aggregate: Any
    hub_model_id: Any


def write_model_card(run: TrainerRun, given: Mapping[str, Any]) -> None:
    """Writes `README.md` into the output folder of a trainer.

    Args:
        run: The trainer; its last evaluation provides the results.
        given: What `Trainer.push_to_hub` passes: `model_name`, `license`, `language`, `tags`.
    """
    model: TaskHeads = run.accelerator.unwrap_model(run.model)
    args, folder = run.args, Path(str(run.args.output_dir))
    source = model.config._name_or_path or type(model.backbone).__name__
    local = Path(source).exists()
    results = list(_results(run))
    adapters = sorted({name for route in model.routes.values() for name in adapters_in(route.adapter)})
    configs = [adapter_config(model.backbone, name) for name in adapters]
    name = given.get("model_name") or folder.name
    tags = [given["tags"]] if isinstance(given.get("tags"), str) else list(given.get("tags") or [])
    data = ModelCardData(
        library_name="pal-adapters",
        tags=sorted({*tags, "pal_adapters", "multi-task", *map(_method, configs), *run.tasks}),
        base_model=None if local else source,
        license=given.get("license"),
        language=given.get("language"),
        model_name=name,
        eval_results=[result for _, _, _, result in results if result is not None] or None,
    )
    sizes = {rows.task.name: len(rows) for rows in run.train_dataset.tasks}
    described = described_run(run.train_dataset, run.eval_dataset, run.scored)
    host = adapter_host(model.backbone)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=name,
        base=Path(source).name if local else source,
        tasks=[
            {
                "name": task,
                "kind": run.tasks[task].kind,
                "size": sizes[task],
                "adapter": model.routes[task].adapter or "none",
                "weight": model.routes[task].weight,
            }
            for task in run.tasks
        ],
        described=described,
        base_revision=getattr(model.config, "_commit_hash", None),
        versions=[f"{name} {number}" for name, number in package_versions().items()],
        example=json.dumps(_example(described[0]), ensure_ascii=False),
        methods=sorted({type(config).__name__ for config in configs}),
        base_trained=model.base_trained,
        sampling=getattr(run.strategy, "__name__", str(run.strategy)),
        mixed=args.mixed_batches,
        counts=model.count_parameters(),
        steps=run.state.global_step,
        batch_size=args.train_batch_size * args.world_size,
        accumulation=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        results=[(key, metric, value) for key, metric, value, _ in results],
        install=how_to_install(f"train,{host}" if host else "train"),
        # If hub_model_id has no owner, only the Hub knows whose repository it is.
        place=json.dumps(run.hub_model_id or args.hub_model_id or name),
    )
    replace_text(folder / "README.md", str(card))


def _example(task: TaskDescription) -> dict[str, Any]:
    """A request for a task, with an ellipsis for each text."""
    text: Any = ["..."] if task.kind == "token_tagging" else "..."
    numbers = {column: 0 for column in task.text_columns if task.template != COLUMNS and column.endswith("_index")}
    return {"task": task.name, **dict.fromkeys(task.text_columns, text), **numbers}


def _method(config: Any) -> str:
    """The name of an adapter's method, as a tag."""
    own = getattr(getattr(config, "method", None), "name", None)
    kind = own or getattr(config, "peft_type", None) or getattr(config, "architecture", None)
    return str(getattr(kind, "value", kind) or type(config).__name__.removesuffix("Config")).lower()


def _results(run: TrainerRun) -> Iterator[tuple[str, str, float, EvalResult | None]]:
    """For each score of the last evaluation: evaluation set, metric, value and entry of the model index."""
    scored: dict[str, Any] = next((entry for entry in reversed(run.state.log_history) if "eval_average" in entry), {})
    evaluated = run.eval_dataset or {}
    for key, found in scores_by_set(evaluated, scored).items():
        task: Task = evaluated[key].task
        for metric, value in found.items():
            result = EvalResult(
                task_type=_HUB_TASKS.get(task.kind, "text-classification"),
                task_name=task.name,
                dataset_type=task.benchmark or task.name,
                dataset_name=key,
                dataset_config=task.name if task.benchmark else None,
                metric_type=metric,
                metric_value=value,
            )
            yield key, metric, value, result
    if scored:
        own = run.aggregate
        aggregate = run.args.eval_aggregate if own is None else getattr(own, "__name__", type(own).__name__)
        yield "all", f"{aggregate} of the primary metrics", scored["eval_average"], None
