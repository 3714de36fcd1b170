"""`task_heads.json`, which describes what a folder of `TaskHeads` holds. It is checked before it is used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn

from pal_adapters.errors import ConfigError, StorageError

from .base import is_saved_class, library_of, model_class, source_of
from .files import cause_of, inside, read_json
from .heads import POOLINGS, TOKEN_KINDS, HeadConfig
from .names import name_fault, require_task_name
from .routes import Route, adapter_from_json, adapter_host, adapter_names, adapter_to_json, stored_names

DESCRIPTION_FILE = "task_heads.json"
FORMATS = (1, 2)
"""2 marks folders with input embeddings of their own, which earlier releases would misread."""
HOSTS = ("none", "adapters", "peft")
MAX_WEIGHT = 1e30


@dataclass(frozen=True)
class Description:
    """What a folder holds.

    Args:
        balance: See `TaskHeads`.
        heads: Configuration of each head.
        tasks: Route of each task, its adapter as `adapter_to_json` gives it.
        host: One of `HOSTS`.
        base: Class of the base model (`module` and `class`), and where it was loaded from (`name_or_path`).
        adapters: Names of the adapters, each with a folder of its own.
        fusions: Names of the fusions, likewise.
        base_trained: Whether the folder holds the base model.
        output_layer: Whether it holds the output layer of a language model.
        embeddings: Whether it holds the input embeddings, which were resized.
    """

    balance: str
    heads: Mapping[str, HeadConfig]
    tasks: Mapping[str, Mapping[str, Any]]
    host: str
    base: Mapping[str, str]
    adapters: tuple[str, ...] = ()
    fusions: tuple[str, ...] = ()
    base_trained: bool = False
    output_layer: bool = False
    embeddings: bool = False
    path: Path = field(default_factory=Path, compare=False)

    def routes(self) -> dict[str, Route]:
        """The routes of the tasks."""
        return {
            task: Route(route["head"], adapter_from_json(route["adapter"]), float(route["weight"]))
            for task, route in self.tasks.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "format": 2 if self.embeddings else 1,
            "balance": self.balance,
            "heads": {name: asdict(config) for name, config in self.heads.items()},
            "tasks": dict(self.tasks),
            "base_trained": self.base_trained,
            "output_layer": self.output_layer,
            **({"embeddings": True} if self.embeddings else {}),
            "host": self.host,
            "base": dict(self.base),
            "adapters": list(self.adapters),
            "fusions": list(self.fusions),
        }

    def base_class(self) -> Any:
        """The class of the base model.

        Raises:
            StorageError: If it is not a model class of transformers or adapters.
        """
        library: Any = transformers
        if self.base["module"] != "transformers":
            import adapters  # only here: other hosts do without it

            library = adapters
        try:
            found = getattr(library, self.base["class"], None)
        except Exception as error:  # importing a part of the library may raise anything
            raise StorageError(
                f"{self.path}: the base model class {self.base['class']} cannot be imported ({cause_of(error)})."
            ) from error
        if not is_saved_class(found):
            raise StorageError(
                f"{self.path}: {self.base['class']!r} is not a model class of {library.__name__}: pass backbone=..., "
                "the base model."
            )
        return found


def describe(
    backbone: Any,
    heads: Mapping[str, HeadConfig],
    routes: Mapping[str, Route],
    balance: str,
    *,
    base_trained: bool,
    output_layer: bool,
    embeddings: bool,
) -> Description:
    """The description of a model. The last three arguments say what else its folder holds, see `Description`."""
    host = adapter_host(backbone)
    model: Any = backbone.get_base_model() if host == "peft" else backbone
    found: type[nn.Module] = model_class(model)
    return Description(
        balance=balance,
        heads=heads,
        tasks={
            task: {"head": route.head, "adapter": adapter_to_json(route.adapter), "weight": route.weight}
            for task, route in routes.items()
        },
        host=host or "none",
        base={
            "module": found.__module__ if library_of(found) == "adapters" else "transformers",
            "class": found.__name__,
            "name_or_path": source_of(backbone),
        },
        adapters=adapter_names(backbone),
        fusions=tuple(backbone.adapters_config.fusions) if host == "adapters" else (),
        base_trained=base_trained,
        output_layer=output_layer,
        embeddings=embeddings,
    )


def read_description(directory: Path) -> Description:
    """Reads and checks the description of a folder.

    Raises:
        StorageError: If it is missing or damaged, has an unknown format or host, or names something a folder cannot
            hold.
    """
    path = inside(directory, DESCRIPTION_FILE)
    if not path.is_file():
        raise StorageError(f"{path} is not there: {directory} was not written by TaskHeads, or not completely.")
    stored = read_json(path)
    number = stored.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number not in FORMATS:
        raise StorageError(
            f"{path}: format={number!r:.40} is unknown, this release reads {', '.join(map(str, FORMATS))}: "
            "upgrade pal-adapters, or write the folder again."
        )
    try:
        return _checked(stored, path)
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({cause_of(error)}).") from error


def _checked(stored: Mapping[str, Any], path: Path) -> Description:
    known = {"format", "balance", "heads", "tasks", "host", "base", "adapters", "fusions", "base_trained"}
    _require(known <= set(stored), f"without {', '.join(sorted(known - set(stored)))}")
    unknown = set(stored) - known - {"output_layer", "embeddings"}
    _require(not unknown, f"unknown field {', '.join(sorted(unknown)):.80}")
    _require(stored["balance"] in ("task", "row"), f"balance={stored['balance']!r:.40}")
    _require(stored["host"] in HOSTS, f"host={stored['host']!r:.40} is not one of {', '.join(HOSTS)}")
    for name in ("base_trained", "output_layer", "embeddings"):
        _require(isinstance(stored.get(name, False), bool), f"{name}={stored.get(name)!r:.40}")
    resized = stored.get("embeddings", False)
    _require(resized is (stored["format"] == 2), f"format={stored['format']} and embeddings={resized}")
    names = {kind: _names(kind, stored[kind]) for kind in ("adapters", "fusions")}
    _require(bool(names["adapters"]) or stored["host"] != "peft", "no adapters")
    _require(stored["host"] != "none" or not names["adapters"], "adapters without a host")
    _require(stored["host"] == "adapters" or not names["fusions"], "fusions outside adapters")
    heads, tasks = stored["heads"], stored["tasks"]
    _require(isinstance(heads, dict) and isinstance(tasks, dict), "heads or tasks")
    for name in (*heads, *tasks):
        require_task_name("a name", name)
    for task, route in tasks.items():
        _check_route(task, route, heads, names, stored["host"])
    base = stored["base"]
    _require(isinstance(base, dict) and set(base) == {"module", "class", "name_or_path"}, f"base={base!r:.80}")
    _require(all(isinstance(value, str) for value in base.values()), f"base={base!r:.80}")
    home = re.fullmatch(r"transformers|adapters\.models\.\w+\.\w+", base["module"])
    _require(home is not None, f"base has module={base['module']!r:.80}")
    _require(base["class"].isidentifier(), f"base has class={base['class']!r:.80}")
    return Description(
        balance=stored["balance"],
        heads={name: _head(name, config) for name, config in heads.items()},
        tasks=tasks,
        host=stored["host"],
        base=base,
        adapters=names["adapters"],
        fusions=names["fusions"],
        base_trained=stored["base_trained"],
        output_layer=stored.get("output_layer", False),
        embeddings=stored.get("embeddings", False),
        path=path,
    )


def _head(name: str, stored: Any) -> HeadConfig:
    _require(isinstance(stored, dict), f"head {name!r}")
    known = {one.name for one in fields(HeadConfig)}
    _require(set(stored) == known, f"head {name!r} needs exactly {', '.join(sorted(known))}")
    if (
        stored["kind"] in TOKEN_KINDS and stored["pooling"] in POOLINGS
    ):  # earlier releases accepted any, without effect
        stored = {**stored, "pooling": "mean"}
    try:
        return HeadConfig(**stored)
    except ConfigError as error:
        raise ConfigError(f"head {name!r}: {error}") from error


def _check_route(task: str, route: Any, heads: Any, names: Mapping[str, tuple[str, ...]], host: str) -> None:
    _require(isinstance(route, dict) and set(route) == {"head", "adapter", "weight"}, f"task {task!r}")
    _require(isinstance(route["head"], str) and route["head"] in heads, f"task {task!r} has an unknown head")
    weight = route["weight"]
    good = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight < MAX_WEIGHT
    _require(good, f"task {task!r} has weight={weight!r:.40}")
    for kind, found in zip(("adapters", "fusions"), stored_names(route["adapter"]), strict=True):
        unknown = sorted(set(found) - set(names[kind]))
        _require(not unknown, f"task {task!r} uses {unknown[:1]}, which is not among the {kind}")
    _require(host == "adapters" or not isinstance(route["adapter"], dict), f"task {task!r} has a composition")


def _names(kind: str, found: Any) -> tuple[str, ...]:
    _require(isinstance(found, list), kind)
    for name in found:
        _require(name_fault(name) is None, f"{kind} has {name!r:.60}")
    _require(len(set(found)) == len(found), f"{kind} has a name twice")
    return tuple(cast("list[str]", found))


def _require(good: bool, fault: str) -> None:
    if not good:
        raise ConfigError(fault)
