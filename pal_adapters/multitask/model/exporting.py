"""The forward pass of a `TaskHeads` that `torch.export` traces, with the tasks of the examples as a graph input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pal_adapters.errors import UnsupportedError

from .heads import Head
from .readout import require_task, task_logits
from .routes import Route, adapter_config, adapter_host, adapter_names, adapter_tasks, route_key
from .routing import Hidden, has_method, pass_of_adapters, run_active
from .setups import active_in_peft, in_pass


class Tasks(Protocol):
    """The part of a `TaskHeads` that this file uses."""

    backbone: Any
    routes: dict[str, Route]

    def head(self, task: str) -> Head:
        """The head of a task."""


def logits_of_graph(model: Tasks, task_ids: Any, labels: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The logits of each task for all `r` encoder inputs, `[r, ...]`; only those of its own examples are meaningful.

    Args:
        model: The `TaskHeads`.
        task_ids: The indices of the tasks, an integer tensor `[r]`, or the name of the one task to export.
        labels: Not allowed.
        inputs: Arguments of the backbone.

    Raises:
        UnknownAdapterError: If there is no task of that name.
        UnsupportedError: For anything that a graph cannot express.
    """
    if labels is not None:
        raise UnsupportedError("labels cannot be exported: leave them out, a graph computes logits.")
    backbone, mask = model.backbone, inputs.get("attention_mask")
    if isinstance(task_ids, str):
        require_task(task_ids, tuple(model.routes))
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        ids = torch.zeros(first.shape[0], dtype=torch.long, device=first.device)
        states = _run(backbone, inputs, [model.routes[task_ids].adapter], [task_ids], ids)
        return task_logits(backbone, {task_ids: model.head(task_ids)}, None, states, mask)
    if not isinstance(task_ids, Tensor) or task_ids.is_floating_point() or task_ids.dim() != 1:
        raise UnsupportedError(
            "task_ids of a graph are an integer tensor of shape [batch] among the inputs, or the name of the one task "
            'to export, task_ids="rte".'
        )
    heads = {task: model.head(task) for task in model.routes}
    for task, head in heads.items():
        if head.config.kind == "multiple_choice":
            raise UnsupportedError(
                f"task {task!r} takes several inputs per example, so it shares no graph with other tasks: export it "
                f"alone, task_ids={task!r}."
            )
    adapters = [route.adapter for route in model.routes.values()]
    return task_logits(backbone, heads, None, _run(backbone, inputs, adapters, list(heads), task_ids.long()), mask)


def _run(backbone: Any, inputs: dict[str, Any], adapters: Sequence[Any], tasks: Sequence[str], ids: Tensor) -> Hidden:
    known: dict[str, Any] = {route_key(adapter): adapter for adapter in adapters}
    host, first = adapter_host(backbone), adapters[0]
    if len(known) > 1:
        _check(backbone, known)
    served = adapter_tasks(backbone, first)
    more = {"task_ids": _lookup([served.index(task) for task in tasks], ids)} if served else {}
    numbers = _lookup([list(known).index(route_key(adapter)) for adapter in adapters], ids)
    if host == "adapters" and len(known) == 1:
        return pass_of_adapters(backbone, inputs, first, more)
    if host == "adapters":
        from adapters.composition import MultiTask  # only here: PEFT and plain models do without `adapters`

        return pass_of_adapters(backbone, inputs, MultiTask(*known.values()), {"task_ids": numbers})
    if host is None:
        return run_active(backbone, inputs, {})
    if served or not all(has_method(adapter_config(backbone, name)) for name in adapter_names(backbone)):
        under = partial(active_in_peft, backbone, first)
        return in_pass(backbone, under, lambda: run_active(backbone, inputs, more))
    from pal_adapters.hosts.peft.routing import AdapterInput  # only here: other hosts do without PEFT

    names = tuple("__base__" if adapter is None else adapter for adapter in known.values())
    return run_active(backbone, inputs, {"adapter_names": AdapterInput(names, numbers)})


def _lookup(table: Sequence[int], ids: Tensor) -> Tensor:
    return torch.tensor(table, device=ids.device).index_select(0, ids)


def _check(backbone: Any, known: Mapping[str, Any]) -> None:
    alone = 'export one task at a time, such as task_ids="rte"'
    present = adapter_names(backbone)
    for key, adapter in known.items():
        if adapter is None and adapter_host(backbone) == "peft":
            continue
        if not isinstance(adapter, str):
            raise UnsupportedError(
                f"a graph with several tasks cannot have the adapter {key} for one of them: {alone}."
            )
        if adapter_tasks(backbone, adapter):
            raise UnsupportedError(
                f"{adapter!r} is one network for several tasks, so it shares no graph with other adapters: {alone}."
            )
    foreign = next((name for name in present if not has_method(adapter_config(backbone, name))), None)
    if foreign is not None:
        raise UnsupportedError(
            f"adapter {foreign!r} is of a method of the host, which cannot take the tasks from an input: {alone}."
        )
