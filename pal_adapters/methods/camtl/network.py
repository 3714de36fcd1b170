"""Operations on a CA-MTL network in either host: add a task, count parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.checks import MODEL, string
from pal_adapters.errors import ConfigError, UnknownAdapterError
from pal_adapters.hosts.unchanged import all_or_nothing, keep_values
from pal_adapters.hosts.which import host_of, is_peft_model

from .alone import join_table, train_alone
from .layer import ConditionalBlock
from .task import draw_rows


@dataclass(frozen=True)
class NetworkSize:
    """The number of parameters of a CA-MTL network and of its model, without heads.

    Attributes:
        added: conditional modules and task embeddings.
        base: the pretrained model.
        trained_base: pretrained parameters that the network trains, as copies or in place.
        per_task: what each further task adds, without its head.
    """

    added: int
    base: int
    trained_base: int
    per_task: int

    @property
    def frozen_share(self) -> float:
        """The share of the pretrained parameters that stays frozen."""
        return 1 - self.trained_base / self.base

    def __str__(self) -> str:
        return (
            f"{self.added:,} parameters added ({1 + self.added / self.base:.4f} x the base of {self.base:,}); "
            f"{self.trained_base:,} of the base are trained, {self.frozen_share:.1%} are frozen; {self.per_task:,} "
            "more per further task"
        )


def _units(model: nn.Module, adapter_name: str) -> Iterator[tuple[nn.Module, ConditionalBlock]]:
    """An adapter's units with the layers that hold them."""
    for layer in model.modules():
        containers = [getattr(layer, "ca_mtl_units", None), getattr(layer, "pal_adapters", None)]
        for container in containers:
            if isinstance(container, nn.ModuleDict) and adapter_name in container:
                held = container[adapter_name]
                members = held.values() if isinstance(held, nn.ModuleDict) else [held]
                for unit in members:
                    if isinstance(unit, ConditionalBlock):
                        yield layer, unit


def _found(model: nn.Module, adapter_name: str) -> list[tuple[nn.Module, ConditionalBlock]]:
    MODEL("model", model)
    string()("adapter_name", adapter_name)
    units = list(_units(model, adapter_name))
    if not units:
        raise UnknownAdapterError(f"adapter_name={adapter_name!r} is not the name of a ca_mtl adapter on this model.")
    return units


def _config(model: Any, adapter_name: str) -> Any:
    """The network's config: what PEFT keeps, or the one inside the config of `adapters`."""
    if host_of(model) == "peft":
        return model.peft_config[adapter_name]
    from pal_adapters.hosts.adapters.config import task_configs  # the host may be missing

    whole = model.adapters_config.get(adapter_name)
    return next(config for config in task_configs(whole) if config.method.network)


def network_size(model: nn.Module, adapter_name: str = "default") -> NetworkSize:
    """The size of a network, and how much of the base model is trained with it.

    Args:
        model: a `PeftModel` or a model of `adapters`.
        adapter_name: the network's name.

    Raises:
        UnknownAdapterError: if there is no such network.

    Example:
        ```python
        print(network_size(model, "all"))
        ```
    """
    units = [unit for _, unit in _found(model, adapter_name)]
    copies = {id(p) for unit in units for part in (unit.base, unit.outer, unit.task_vectors) for p in part.values()}
    own = {id(p): p.numel() for unit in units for p in unit.parameters() if id(p) not in copies}
    shared = units[0].shared_weights()
    own |= {id(p): p.numel() for p in shared.values()}
    trained = sum(p.numel() for unit in units for part in (unit.base, unit.outer) for p in part.values())
    trained += sum(p.numel() for unit in units if unit.in_place is not None for p in unit.in_place.tensors().values())
    return NetworkSize(sum(own.values()), _base_size(model), trained, shared["task_embedding"].shape[1])


def _base_size(model: Any) -> int:
    inner = model.get_base_model() if is_peft_model(model) else model
    inner = getattr(inner, "base_model", inner)
    if host_of(model) == "adapters":
        from pal_adapters.hosts.adapters.base_weights import base_parameters  # the host may be missing

        return sum(p.numel() for p in base_parameters(inner).values())
    from pal_adapters.hosts.peft.joint import task_parameter_ids  # the host may be missing

    added = task_parameter_ids(inner)
    return sum(p.numel() for p in inner.parameters() if id(p) not in added)


def add_task(model: nn.Module, task: str, adapter_name: str = "default") -> int:
    """Add a task to a trained network: one row of task embeddings, `N(0, 0.02^2)`; nothing else changes.

    The embedding table is then a new parameter, so create the optimizer afterwards. Heads are up to the caller.

    Args:
        model: a `PeftModel` or a model of `adapters`.
        task: the name of the new task.
        adapter_name: the network's name.

    Returns:
        The number of the new task.

    Raises:
        UnknownAdapterError: if there is no such network.
        ConfigError: if the network has a task of that name.
    """
    units = _found(model, adapter_name)
    config = _config(model, adapter_name)
    tasks: list[str] = config.tasks
    if not isinstance(task, str) or not task or task in tasks:
        raise ConfigError(f"task={task!r} is not allowed: use a name other than {', '.join(map(repr, tasks))}.")
    with all_or_nothing(model, config):
        train_tasks(model, None, adapter_name)
        table = units[0][1].shared_weights()["task_embedding"]
        row = torch.empty(1, table.shape[1])
        draw_rows(row)
        new = nn.Parameter(torch.cat([table.detach(), row.to(table)]), requires_grad=table.requires_grad)
        _replace(model, table, new)
        tasks.append(task)  # the list that is saved with the adapter
    return len(tasks) - 1


def train_tasks(model: nn.Module, tasks: Iterable[str] | None, adapter_name: str = "default") -> list[nn.Parameter]:
    """Freeze a model except for the embeddings of some tasks of a network, such as a task from `add_task`.

    All other tasks compute exactly what they did before, whatever the optimizer, even with weight decay. Heads are up
    to the caller; `TaskHeads.prepare_training(tasks)` takes care of both.

    Args:
        model: a `PeftModel` or a model of `adapters`.
        tasks: the names of the tasks. None ends this state: the task embeddings are one table again and keep what they
            learned; what is trained from then on is up to the host, as in `model.train_adapter(...)`.
        adapter_name: the network's name.

    Returns:
        The embeddings. Create the optimizer afterwards.

    Raises:
        UnknownAdapterError: if there is no such network.
        ConfigError: if the network does not have one of the tasks, or `tasks` is empty.
    """
    units, known = _found(model, adapter_name), list(_config(model, adapter_name).tasks)
    if isinstance(tasks, str):
        raise ConfigError(f"tasks={tasks!r} is not allowed: pass a list of names, [{tasks!r}].")
    if tasks is not None and not isinstance(tasks, Iterable):
        raise ConfigError(f"tasks={tasks!r} is not allowed: pass a list of names.")
    numbers = []
    for task in dict.fromkeys(tasks or ()):
        if task not in known:
            raise ConfigError(f"tasks has {task!r}, which is not a task of {adapter_name!r}: use {', '.join(known)}.")
        numbers.append(known.index(task))
    members = [unit for _, unit in units]
    table: Any = members[0].shared_weights()["task_embedding"]
    if tasks is not None and not numbers:
        raise ConfigError(f"tasks={tasks!r} names no task: use {', '.join(known)}, or None to end this state.")
    with all_or_nothing(model):
        keep_values([table])
        if tasks is None:
            join_table(members, table)
            return []
        model.requires_grad_(False)
        return train_alone(members, table, numbers)


def _replace(model: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                module._parameters[name] = new
