"""Turns the learned combinations of a trained folder into plain adapters, which need neither sources nor this package.

    pal-adapters fold out/combined --output out/plain

Attention over the sources (AdapterFusion) cannot be folded, because its weights depend on the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.fusion.folding import fold
from pal_adapters.hosts.which import is_peft_model
from pal_adapters.multitask import Route, TaskHeads
from pal_adapters.multitask.model.description import read_description
from pal_adapters.multitask.model.routes import adapter_config, adapter_names, is_fuse
from pal_adapters.multitask.predict.loading import load_tokenizer

from .options import PositiveInt, option, parse
from .shared import model_folder


@dataclass
class FoldOptions:
    """The options of `fold`."""

    output: str = option("folder to write")
    truncate: PositiveInt | None = option("largest width or rank of a folded adapter (default: exact)", None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    args, given = parse("pal-adapters fold", __doc__, argv, FoldOptions, folder="a folder with learned combinations")
    source = Path(model_folder(given.folder))
    if source.resolve() == Path(args.output).resolve():
        raise ConfigError(f"--output {args.output} is the folder to read: use another one")
    routes = read_description(source).routes()
    model = TaskHeads.from_pretrained(source)
    combined = [task for task, route in routes.items() if _is_combination(model.backbone, route.adapter)]
    if not combined:
        raise ConfigError(f"{source} has no combinations to fold; its tasks are {', '.join(routes)}")
    options = {} if args.truncate is None else {"truncate": args.truncate}
    work = _fold_in_peft if is_peft_model(model.backbone) else _fold_in_adapters
    folded = work(model, routes, combined, options)
    folded.described = dict(model.described)
    tokenizer = load_tokenizer(source) if (source / "tokenizer_config.json").is_file() else None
    folded.save_pretrained(args.output, processing_class=tokenizer)
    print(f"folded: {', '.join(combined)}; written: {args.output}")
    return 0


def _is_combination(backbone: Any, adapter: Any) -> bool:
    if is_peft_model(backbone) and adapter is not None:
        from pal_adapters.fusion.peft.config import CombinationPeftConfig  # only here: PEFT may be missing

        return isinstance(adapter_config(backbone, adapter), CombinationPeftConfig)
    return is_fuse(adapter)


def _fold_in_adapters(
    model: TaskHeads, routes: Mapping[str, Route], combined: Sequence[str], options: dict[str, Any]
) -> TaskHeads:
    """Folds each fusion, and removes the fusions and the sources that no task uses any more."""
    backbone = model.backbone
    adapters = {task: route.adapter for task, route in routes.items()}
    for task in combined:
        name = f"{task}_folded"
        fold(backbone, adapters[task], name=name, **options)
        adapters[task] = name
    folded = _with_heads(backbone, model, routes, adapters)
    for fusion in list(backbone.adapters_config.fusions):
        backbone.delete_adapter_fusion(fusion)
    for name in adapter_names(backbone):
        if name not in adapters.values():
            backbone.delete_adapter(name)
    return folded


def _fold_in_peft(
    model: TaskHeads, routes: Mapping[str, Route], combined: Sequence[str], options: dict[str, Any]
) -> TaskHeads:
    """Folds the combination, which has to be the only adapter: folding produces another kind of model."""
    names = {route.adapter for route in routes.values()}
    if len(names) > 1 or None in names:
        raise UnsupportedError(
            f"the folder has several adapters ({', '.join(map(str, sorted(names, key=str)))}), and PEFT folds a model "
            "with one combination: save each in a folder of its own"
        )
    (name,) = names
    backbone = fold(model.backbone, name, **options)
    return _with_heads(backbone, model, routes, dict.fromkeys(routes, name))


def _with_heads(
    backbone: Any, model: TaskHeads, routes: Mapping[str, Route], adapters: Mapping[str, Any]
) -> TaskHeads:
    """The tasks of a model, with its heads, on other adapters."""
    made = TaskHeads(backbone)
    for task, route in routes.items():
        made.add(task, model.head(task).config, adapter=adapters[task], weight=route.weight)
        made.head(task).load_state_dict(model.head(task).state_dict())
    return made
