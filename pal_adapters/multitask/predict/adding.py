"""Adds a saved task to a model that answers requests, and removes it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pal_adapters.errors import ConfigError, StorageError, UnsupportedError
from pal_adapters.hooks.in_place import parts_in_place
from pal_adapters.hosts.unchanged import all_or_nothing
from pal_adapters.multitask.model.adapter_files import add_adapters, check_adapter_files
from pal_adapters.multitask.model.base import source_of
from pal_adapters.multitask.model.contents import HEADS, POOLER
from pal_adapters.multitask.model.description import Description, read_description
from pal_adapters.multitask.model.files import check_fit, copy_into, read_tensors, tensor_files
from pal_adapters.multitask.model.heads import Head
from pal_adapters.multitask.model.names import require_task_name
from pal_adapters.multitask.model.putting_back import items_kept, put_back
from pal_adapters.multitask.model.routes import (
    Route,
    adapter_from_json,
    adapter_host,
    adapter_names,
    adapters_in,
    check_adapter,
    is_fuse,
    stored_names,
)
from pal_adapters.multitask.model.setups import activate_in_peft
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.model.tasks_file import read_tasks

from .loading import load_tokenizer


@dataclass(frozen=True)
class SavedTask:
    """A task of a folder, checked and ready to be added to a model.

    Args:
        description: Its description, with its new name.
        folder: The folder.
        contents: What the folder says about the task's adapters.
        names: The new name of each of its adapters.
        adapter: Its adapter, as it is stored.
        head: Its head.
    """

    description: TaskDescription
    folder: Path
    contents: Description
    names: dict[str, str]
    adapter: Any
    head: Head


def read_saved_task(model: TaskHeads, tokenizer: Any, name: str, folder: Path) -> SavedTask:
    """Reads a task of a folder and checks that it fits a model. The model does not change.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        name: The name of the task: one of the folder's or, if the folder has only one, any name.
        folder: The folder.

    Raises:
        ConfigError: If there is a task of that name already, or none in the folder.
        StorageError: If the folder is incomplete or damaged.
        UnsupportedError: If it was saved on another base model, or needs another host.
    """
    require_task_name("name", name)
    if name in model.routes:
        raise ConfigError(f"name={name!r} is there already: remove the task first, or use another name.")
    if not folder.is_dir():
        raise StorageError(f"{folder} is not a folder.")
    contents = read_description(folder)
    if name not in contents.tasks and len(contents.tasks) != 1:
        there = ", ".join(map(repr, contents.tasks)) or "none"
        raise ConfigError(f"name={name!r} is not a task of {folder}, which has: {there}. Use one of them.")
    stored = name if name in contents.tasks else next(iter(contents.tasks))
    described = read_tasks(folder, {task: contents.heads[route["head"]] for task, route in contents.tasks.items()})
    if stored not in described:
        raise ConfigError(
            f"{folder} does not say how task {stored!r} is encoded: save it with processing_class= and tasks=."
        )
    _check_base(model, contents, folder)
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise UnsupportedError(f"{folder} has a tokenizer with another vocabulary, so its task cannot be added.")
    route = contents.tasks[stored]
    adapters, fusions = stored_names(route["adapter"])
    names = _new_names(model, name, route["adapter"], adapters, fusions)
    contents = replace(contents, adapters=tuple(adapters), fusions=tuple(fusions))
    check_adapter_files(contents, folder)
    head = _read_head(model, contents, route["head"], folder)
    return SavedTask(replace(described[stored], name=name), folder, contents, names, route["adapter"], head)


def _check_base(model: TaskHeads, contents: Description, folder: Path) -> None:
    own = model.base_trained or parts_in_place(model.backbone)
    if contents.base_trained or contents.output_layer or contents.embeddings or own:
        which = "the model" if own else str(folder)
        raise UnsupportedError(
            f"{which} has base weights of its own, which other tasks were not trained on: save models that share a "
            "base after prepare_training(base=False), or use one predictor each."
        )
    there, wanted = source_of(model.backbone), contents.base["name_or_path"]
    if there != wanted:
        raise UnsupportedError(f"{folder} was saved on the base model {wanted!r}, but the model is {there!r}.")
    host = adapter_host(model.backbone)
    if contents.host not in ("none", host):
        raise UnsupportedError(
            f"{folder} has adapters of {contents.host}, but the model has {'none' if host is None else 'those of '}"
            f"{host or ''}: use one predictor each."
        )


def _new_names(model: TaskHeads, task: str, adapter: Any, adapters: list[str], fusions: list[str]) -> dict[str, str]:
    """The new name of each adapter: its own or, if the model has another adapter of that name, the task's."""
    present = set(adapter_names(model.backbone))
    if isinstance(adapter, str) and adapter in present:
        if task in present:
            raise ConfigError(f"name={task!r} is not allowed: the model has an adapter of that name. Use another.")
        return {adapter: task}
    fused = model.backbone.adapters_config.fusions if fusions else ()
    twice = sorted(present & set(adapters)) or sorted(set(fusions) & set(fused))
    if twice:
        raise UnsupportedError(f"adapter {twice[0]!r} of a composition is on the model already: rename one of them.")
    return {}


def _read_head(model: TaskHeads, contents: Description, name: str, folder: Path) -> Head:
    config = contents.heads[name]
    stored = read_tensors(folder, HEADS)
    own = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
    with torch.device("meta"):  # a damaged description may ask for more memory than there is
        shape = Head(config, model.width)
    check_fit(dict(shape.named_parameters()), own, folder / f"{HEADS}.safetensors")
    if config.pooling == "pooler" and not config.reads_tokens and tensor_files(folder, POOLER)[0].is_file():
        base = model.base_tensors()
        for key, value in read_tensors(folder, POOLER).items():
            if key not in base or not torch.equal(base[key].to(value), value):
                raise UnsupportedError(f"{folder} has a pooler of its own, which the other tasks do not use.")
    head = Head(config, model.width)
    copy_into(dict(head.named_parameters()), own)
    return head.requires_grad_(False).eval().to(model.device, _dtype(model))


def _dtype(model: TaskHeads) -> torch.dtype:
    """The type of the heads' weights or, without any, of the base model's."""
    found = (tensor.dtype for tensor in (*model.heads.parameters(), *model.backbone.parameters()))
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


@contextmanager
def whole_change(model: TaskHeads) -> Iterator[None]:
    """If the body raises, the tasks of a model, its heads and its adapters are put back as they were."""
    with items_kept(model.routes, model.described), put_back(model.backbone), all_or_nothing(model):
        yield


def add_saved_task(model: TaskHeads, saved: SavedTask) -> None:
    """Adds a task to a model, whole or not at all. What is active and what trains stay as they were."""
    backbone, name = model.backbone, saved.description.name
    known: dict[int, tuple[Tensor, bool]] = {id(p): (p, p.requires_grad) for p in backbone.parameters()}
    modes = {module: module.training for module in backbone.modules()}
    with put_back(backbone):
        if saved.contents.adapters or saved.contents.fusions:
            add_adapters(backbone, saved.contents, saved.folder, saved.names)
            if parts_in_place(backbone):
                raise UnsupportedError(
                    f"{saved.folder} has an adapter that trains base weights in place, which other tasks were not "
                    "trained on: use one predictor each."
                )
        for parameter in backbone.parameters():
            if id(parameter) not in known:
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(model.device, _dtype(model))
        for parameter, trains in known.values():
            parameter.requires_grad_(trains)
        for module in backbone.modules():
            module.training = modes.get(module, False)
        adapter = saved.adapter
        adapter = saved.names.get(adapter, adapter) if isinstance(adapter, str) else adapter_from_json(adapter)
        check_adapter(backbone, adapter, name)
    model.heads[name] = saved.head
    model.routes[name] = Route(name, adapter)
    model.described[name] = saved.description


def remove_saved_task(model: TaskHeads, name: str) -> None:
    """Removes a task with its head, its adapters and its fusion, unless another task uses them.

    A `PeftModel` keeps its last adapter, since it cannot be without one.
    """
    adapter = model.routes[name].adapter
    model.remove(name)
    others = [route.adapter for route in model.routes.values()]
    kept = {used for other in others for used in adapters_in(other)}
    if is_fuse(adapter) and all(not is_fuse(other) or other.name != adapter.name for other in others):
        model.backbone.delete_adapter_fusion(adapter)
    for unused in dict.fromkeys(adapters_in(adapter)):
        if unused not in kept:
            _delete_adapter(model.backbone, unused)


def _delete_adapter(backbone: Any, name: str) -> None:
    if adapter_host(backbone) == "peft":
        others = [other for other in adapter_names(backbone) if other != name]
        if not others:
            return
        if name in backbone.active_adapters:
            activate_in_peft(backbone, others[:1])
    backbone.delete_adapter(name)
