"""Shows the tasks of a trained folder: kinds, methods, sizes and scores. Reads files only; no model is loaded.

pal-adapters info out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.base_files import REFERENCE
from pal_adapters.multitask.model.description import read_description
from pal_adapters.multitask.model.files import inside, read_json, tensor_files
from pal_adapters.multitask.model.routes import stored_names
from pal_adapters.multitask.model.tasks_file import read_tasks

from .options import parse
from .shared import model_folder, table


@dataclass
class InfoOptions:
    """`info` has no options of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    _, given = parse("pal-adapters info", __doc__, argv, InfoOptions, folder="a trained folder")
    directory = Path(model_folder(given.folder))
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a folder")
    description = read_description(directory)
    heads = {task: description.heads[route["head"]] for task, route in description.tasks.items()}
    described = read_tasks(directory, heads)
    head_sizes = _sizes(tensor_files(directory, "heads"))
    rows = []
    for task, route in description.tasks.items():
        known = described.get(task)
        head = sum(size for name, size in head_sizes.items() if f":{route['head']}." in name)
        score = "" if known is None or known.score is None else f"{known.score:.4f}"
        columns = "" if known is None else ", ".join(known.text_columns)
        rows.append(
            (task, heads[task].kind, columns, _method(directory, route["adapter"]),
             f"{_adapter_size(directory, route['adapter']):,}", f"{head:,}", (known and known.metric) or "", score)
        )  # fmt: skip
    print(table(("task", "kind", "columns", "method", "adapter", "head", "metric", "score"), rows, left=4))
    base = f"{description.base['class']} {description.base['name_or_path']}"
    print(f"\nbase: {base}, {'trained' if description.base_trained else 'unchanged'}; host: {description.host}")
    return 0


def _method(directory: Path, adapter: Any) -> str:
    """The method of a task's adapter, as its host calls it."""
    if adapter is None:
        return "head only"
    if isinstance(adapter, dict):
        return f"{next(iter(adapter))} of {', '.join(stored_names(adapter)[0])}"
    config = read_json(inside(directory, f"{adapter}/adapter_config.json"))
    return str(config.get("peft_type") or config.get("config", {}).get("architecture") or "bottleneck")


def _adapter_size(directory: Path, adapter: Any) -> int:
    """Number of parameters in the files of a task's adapter: shared ones count for each task that uses them."""
    folders = [inside(directory, name) for names in stored_names(adapter) for name in names]
    files = [file for folder in folders for file in folder.glob("*.safetensors") if file.name != "head.safetensors"]
    return sum(_sizes(files).values())


def _sizes(files: Sequence[Path]) -> dict[str, int]:
    """Number of elements of each tensor in some files."""
    found: dict[str, int] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()  # a safetensors file is no mapping: it cannot be iterated over
            shapes = {name: tensors.get_slice(name).get_shape() for name in names if not name.endswith(REFERENCE)}
            found |= {f"{file}:{name}": prod(shape) for name, shape in shapes.items()}
    return found
