"""Which parameters of a backbone and its heads train."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pal_adapters.errors import ConfigError
from pal_adapters.hooks.in_place import parts_in_place
from pal_adapters.methods.camtl.network import train_tasks

from .heads import Head
from .language import output_tensors
from .routes import Route, adapter_config, adapter_host, adapter_tasks, adapters_in, is_fuse


def check_base(backbone: Any, routes: Iterable[Route], *, base: bool) -> None:
    """Raises `ConfigError` if adapters train the base model, or part of it, and `base` says otherwise."""
    if base:
        if parts_in_place(backbone):
            raise ConfigError(
                "base=True is not allowed with an adapter that trains part of the base model in place "
                "(base_weights='in_place'): pass base=False, or use base_weights='copies'."
            )
        return
    names = sorted({name for route in routes if not is_fuse(route.adapter) for name in adapters_in(route.adapter)})
    for name in names:
        config = adapter_config(backbone, name)
        if getattr(config, "train_base", False) and getattr(config, "base_weights", "all") == "all":
            raise ConfigError(
                f"base=False is not allowed with adapter {name!r}, whose config has train_base=True: pass base=True."
            )


def shared_networks(backbone: Any, routes: Iterable[Route], others: Iterable[Route]) -> list[str]:
    """The networks for several tasks that both groups of routes use."""
    used = {route.adapter for route in others if isinstance(route.adapter, str)}
    here = dict.fromkeys(route.adapter for route in routes if isinstance(route.adapter, str))
    return [adapter for adapter in here if adapter in used and adapter_tasks(backbone, adapter)]


def train_vectors(backbone: Any, tasks: Sequence[str], adapter: str) -> list[nn.Parameter]:
    """Makes only the vectors of some tasks of a network trainable; whatever else trains stays as it is."""
    trains = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    vectors = train_tasks(backbone, tasks, adapter)
    for parameter in trains:
        parameter.requires_grad_(True)
    return vectors


def train_routes(model: nn.Module, backbone: Any, routes: Mapping[str, Route], others: Iterable[Route]) -> None:
    """Freezes the model, except the adapters of the routes.

    In a network for several tasks that `others` use as well, only the vectors of the tasks in `routes` train.

    Args:
        model: The model with its heads.
        backbone: Its backbone.
        routes: The routes to train, by task.
        others: Routes whose outputs must not change.
    """
    alone = shared_networks(backbone, routes.values(), others)
    model.requires_grad_(False)
    train_adapters(model, backbone, [route for route in routes.values() if route.adapter not in alone])
    for adapter in alone:
        served = [task for task, route in routes.items() if route.adapter == adapter]
        for vector in train_vectors(backbone, served, adapter):
            vector.requires_grad_(True)


def train_adapters(model: nn.Module, backbone: Any, routes: Sequence[Route]) -> None:
    """Makes the adapters of the routes trainable; for a route with a `Fuse`, the fusion instead of its sources."""
    for name in {name for route in routes for name in adapters_in(route.adapter)}:
        if adapter_tasks(backbone, name):
            train_tasks(backbone, None, name)  # its vectors may have been trained alone before
    fusions = {route.adapter.name: route.adapter for route in routes if is_fuse(route.adapter)}
    names = sorted({name for route in routes if not is_fuse(route.adapter) for name in adapters_in(route.adapter)})
    if adapter_host(backbone) == "peft":
        for name in names:
            if backbone.peft_config[name].is_prompt_learning:  # which PEFT keeps apart from its layers
                backbone.prompt_encoder[name].requires_grad_(True)
            else:
                backbone.set_requires_grad(name)
    elif names or fusions:
        _train_in_adapters(model, backbone, names, list(fusions.values()))


def _train_in_adapters(model: nn.Module, backbone: Any, names: Sequence[str], fusions: Sequence[Any]) -> None:
    from adapters.composition import Parallel  # only here: PEFT and plain models do without `adapters`

    modes = {module: module.training for module in model.modules()}
    setup, chosen = backbone.active_adapters, []
    if names:
        with _quiet_activation():
            backbone.train_adapter(Parallel(*names) if len(names) > 1 else names[0])
        chosen += [p for p in backbone.parameters() if p.requires_grad]
    for fuse in fusions:  # each call freezes what the ones before it have chosen
        backbone.train_adapter_fusion(fuse)
        chosen += [p for p in backbone.parameters() if p.requires_grad]
    for parameter in chosen:
        parameter.requires_grad_(True)
    backbone.set_active_adapters(setup)
    for module, mode in modes.items():
        module.training = mode


@contextmanager
def _quiet_activation() -> Iterator[None]:
    """Drops the host's warning that no adapter is active, which it also gives while it activates the first one."""

    def drop(record: logging.LogRecord) -> bool:
        return "none are activated" not in record.msg

    logger = logging.getLogger("adapters.model_mixin")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def train_base(backbone: Any, base: Mapping[str, Tensor], heads: Iterable[Head]) -> None:
    """Makes the base model trainable, with its output layer if one of the heads is a language model.

    A pooler that no head reads stays frozen: it would get no gradient.
    """
    configs = [head.config for head in heads]
    pooler = any(config.pooling == "pooler" for config in configs)
    for name, tensor in base.items():
        if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(pooler or not name.startswith("pooler."))
    if any(config.kind == "language_modeling" for config in configs):
        for tensor in output_tensors(backbone).values():
            tensor.requires_grad_(True)
