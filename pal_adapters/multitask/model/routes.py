"""The route of a task: its head and its adapter, which may be a composition of `adapters`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from pal_adapters.checks import Check, number, string
from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.hosts.which import host_of, is_peft_model

from .names import require_name

_ADAPTER = Check(
    "the name of an adapter, a Stack or Fuse of names, or None",
    lambda value: value is None or (isinstance(value, str) and bool(value)) or is_fuse(value) or is_stack(value),
)


@dataclass
class Route:
    """Where the examples of a task go.

    Args:
        head: Name of the head.
        adapter: Name of the adapter, a `Stack` or `Fuse` of names in `adapters`, or `None` for the base model alone.
        weight: Weight of the task's loss.
    """

    head: str
    adapter: Any = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        string(empty=False)("head", self.head)
        number()("weight", self.weight)
        _ADAPTER("adapter", self.adapter)


def adapter_host(backbone: Any) -> str | None:
    """`"adapters"`, `"peft"` for a `PeftModel`, or `None` for a model without adapters.

    Raises:
        UnsupportedError: For a model that got its adapter from transformers' own `add_adapter`.
    """
    host = host_of(backbone)
    if host == "peft" and not is_peft_model(backbone):
        raise UnsupportedError(
            "the backbone has an adapter from transformers' own add_adapter, which TaskHeads cannot route or save: "
            "pass get_peft_model(model, config, adapter_name=...)."
        )
    return host


def bare_model(backbone: Any) -> nn.Module:
    """The transformers model that returns the hidden states, without a host's wrapper and without a head."""
    if is_peft_model(backbone):
        backbone = backbone.get_base_model()
    return getattr(backbone, "base_model", backbone)


def adapter_names(backbone: Any) -> tuple[str, ...]:
    """Names of the adapters on a model, in the order in which they were added."""
    host = adapter_host(backbone)
    if host == "peft":
        return tuple(backbone.peft_config)
    return tuple(backbone.adapters_config.adapters) if host == "adapters" else ()


def adapter_config(backbone: Any, name: str) -> Any:
    """The configuration of an adapter."""
    return backbone.peft_config[name] if is_peft_model(backbone) else backbone.adapters_config.get(name)


def adapter_tasks(backbone: Any, adapter: Any) -> list[str]:
    """The tasks that one adapter serves by itself, as a CA-MTL network does; empty for any other adapter."""
    config = adapter_config(backbone, adapter) if isinstance(adapter, str) else None
    return list(getattr(config, "tasks", None) or ())


def is_fuse(adapter: Any) -> bool:
    """Whether the adapter of a task is an AdapterFusion of `adapters`."""
    composition = sys.modules.get("adapters.composition")  # always imported if there is a Fuse
    return composition is not None and isinstance(adapter, composition.Fuse)


def is_stack(adapter: Any) -> bool:
    """Whether the adapter of a task is a `Stack` of `adapters`."""
    composition = sys.modules.get("adapters.composition")
    return composition is not None and isinstance(adapter, composition.Stack)


def adapters_in(adapter: Any) -> list[str]:
    """Names of the adapters in the adapter of a task."""
    if adapter is None:
        return []
    return [adapter] if isinstance(adapter, str) else list(adapter.flatten())


def route_key(adapter: Any) -> str:
    """A key that is equal for equal adapters of tasks. Two fusions of the same sources differ only in their names."""
    if adapter is None or isinstance(adapter, str):
        return str(adapter)
    name = f"{adapter.name}: " if is_fuse(adapter) else ""
    return f"{type(adapter).__name__}[{name}{', '.join(map(route_key, adapter.children))}]"


def check_adapter(backbone: Any, adapter: Any, task: str) -> None:
    """Raises an error unless examples of `task` can be sent through `adapter` and the route can be saved.

    Raises:
        UnknownAdapterError: If an adapter or the fusion is not on the model, or does not serve the task.
        ConfigError: For a name that no folder can have.
        UnsupportedError: For a composition other than a `Stack` or a `Fuse` of names: it has weights or sizes of its
            own, which would neither distinguish two routes nor be saved with them.
    """
    if not is_fuse(adapter) or not all(isinstance(child, str) for child in adapter.children):
        _require_stacks(adapter)
    known = adapter_names(backbone)
    for name in adapters_in(adapter):
        if name not in known:
            there = ", ".join(map(repr, known)) or "none"
            hint = " For the base model alone pass adapter=None." if "base" in name.lower() else ""
            raise UnknownAdapterError(f"adapter={name!r} is not on the model, which has: {there}.{hint}")
        require_name("adapter", name)
    if is_fuse(adapter):
        _check_fusion(backbone, adapter)
    served = adapter_tasks(backbone, adapter)
    if served and task not in served:
        raise UnknownAdapterError(
            f"adapter {adapter!r} is one network for the tasks {served}, and {task!r} is not one of them: call "
            f"pal_adapters.add_task(model, {task!r}, {adapter!r}) first."
        )


def _check_fusion(backbone: Any, fuse: Any) -> None:
    fusions = backbone.adapters_config.fusions
    if fuse.name not in fusions:
        there = ", ".join(map(repr, fusions)) or "none"
        raise UnknownAdapterError(
            f"the fusion {fuse.name!r} is not on the model, which has: {there}. Add it with "
            "add_adapter_fusion(Fuse(...))."
        )
    try:
        require_name("fusion", fuse.name)
    except ConfigError as error:
        raise ConfigError(f"{error} Fuse(..., name=...) gives it another one.") from None
    _, sources = backbone.adapters_config.get_fusion(fuse.name)
    if list(sources) != list(fuse.children):
        raise UnknownAdapterError(
            f"the fusion {fuse.name!r} has the sources {list(sources)}, not {list(fuse.children)}: name them in "
            "that order."
        )


def _require_stacks(adapter: Any) -> None:
    if adapter is None or isinstance(adapter, str):
        return
    if not is_stack(adapter):
        raise UnsupportedError(
            f"adapter={adapter} is not allowed for a task: use a name, a Stack of names or a Fuse of names. To use an "
            "average, make one adapter of it with average_adapter and name that."
        )
    for child in adapter.children:
        _require_stacks(child)


def adapter_to_json(adapter: Any) -> Any:
    """The adapter of a task as JSON."""
    if adapter is None or isinstance(adapter, str):
        return adapter
    children = [adapter_to_json(child) for child in adapter.children]
    return {"Fuse": children, "name": adapter.name} if is_fuse(adapter) else {"Stack": children}


def adapter_from_json(stored: Any) -> Any:
    """The inverse of `adapter_to_json`, for what `stored_names` has checked."""
    if not isinstance(stored, dict):
        return stored
    from adapters.composition import Fuse, Stack  # only here: PEFT and plain models do without `adapters`

    if "Fuse" in stored:
        return Fuse(*stored["Fuse"], name=stored["name"])
    return Stack(*[adapter_from_json(child) for child in stored["Stack"]])


def stored_names(stored: Any, *, inside: bool = False) -> tuple[list[str], list[str]]:
    """Names of the adapters and of the fusions in what `adapter_to_json` wrote.

    Raises:
        ValueError: If it is not of that form.
    """
    if stored is None and not inside:
        return [], []
    if isinstance(stored, str):
        return [stored], []
    if isinstance(stored, dict):
        if set(stored) == {"Stack"} and isinstance(stored["Stack"], list) and stored["Stack"]:
            found = [stored_names(child, inside=True) for child in stored["Stack"]]
            return [name for names, _ in found for name in names], [name for _, names in found for name in names]
        if not inside and set(stored) == {"Fuse", "name"} and isinstance(stored["name"], str):
            children = stored["Fuse"]
            if isinstance(children, list) and children and all(isinstance(child, str) for child in children):
                return children, [stored["name"]]
    raise ValueError(f"{stored!r:.80} is not an adapter: expected a name, null, a Stack or a Fuse")
