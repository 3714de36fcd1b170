"""Which head and adapter a new task gets, checked before the model changes."""

from __future__ import annotations

from typing import Any

from torch import nn

from pal_adapters.errors import ConfigError

from .heads import HeadConfig, Loss
from .names import require_task_name
from .routes import Route, adapter_names, check_adapter


def new_route(
    backbone: Any,
    heads: nn.ModuleDict,
    routes: dict[str, Route],
    task: str,
    head: HeadConfig | str,
    *,
    adapter: Any,
    weight: float,
    loss: Loss | None,
) -> Route:
    """The route of a new task, see `TaskHeads.add`, which names the errors."""
    require_task_name("task", task)
    if task in routes:
        raise ConfigError(f"task={task!r} is there already: {', '.join(routes)}. Use another name.")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ConfigError(f"weight={weight!r} is not allowed: use a number above 0.")
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss={loss!r:.80} is not allowed: use a function of logits and labels, or None.")
    if isinstance(head, str):
        if head not in heads:
            raise ConfigError(f"head={head!r} is not there: {', '.join(heads) or 'there is none'}.")
        if loss is not None:
            raise ConfigError(f"loss has no effect for the head {head!r}, which is there already: leave it out.")
    elif not isinstance(head, HeadConfig):
        raise ConfigError(f"head={head!r:.80} is not allowed: pass HeadConfig(...) or the name of a head.")
    elif task in heads:  # left by a removed task because another task uses it
        raise ConfigError(f"a head {task!r} is there already: pass head={task!r} to use it.")
    if isinstance(adapter, str) and adapter == "auto":
        adapter = _own_adapter(adapter_names(backbone), task)
    check_adapter(backbone, adapter, task)
    return Route(head if isinstance(head, str) else task, adapter, float(weight))


def _own_adapter(names: tuple[str, ...], task: str) -> str | None:
    """The adapter named after the task, or the only adapter; `None` if there are none."""
    if len(names) > 1 and task not in names:
        raise ConfigError(
            f"task {task!r} has no adapter of its name among {', '.join(map(repr, names))}: pass adapter=, one of "
            "them, or None for the base model alone."
        )
    return task if task in names else names[0] if names else None
