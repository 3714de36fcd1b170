"""The recipes that are compared: how each builds its model, and the learning rates to try for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pal_adapters.cli.combining import HOSTS
from pal_adapters.multitask import TaskHeads, default_host, get_preset

HOULSBY_SHARE = 0.036
"""Parameters of a task in the paper, as a share of the base model's."""


@dataclass(frozen=True)
class Recipe:
    """How a model is built and trained.

    Args:
        rates: Learning rates in the order in which they are tried: the usual one first.
        preset: A recipe of `pal_adapters.multitask.PRESETS`; none for bottlenecks and their combinations.
        combination: How sources are combined, see `pal-adapters transfer`.
        host: The host to use if it is installed.
        training: Arguments of `MultiTaskTrainingArguments`.
    """

    rates: tuple[float, float, float, float]
    preset: str | None = None
    combination: str | None = None
    host: str = "adapters"
    training: dict[str, Any] = field(default_factory=lambda: {"group_by_length": True})


_MIXED = {"mixed_batches": True}
_SCALEARN_RATES = (6e-3, 3e-2, 1e-1, 2e-3)
RECIPES: dict[str, Recipe] = {
    "full": Recipe((1e-4, 5e-5, 2e-4, 2e-5), "full"),
    "houlsby": Recipe((1e-3, 3e-3, 3e-4, 3e-5), "houlsby", host="peft"),
    "pals": Recipe((1e-4, 5e-5, 2e-4, 2e-5), "pals", training={"group_by_length": True, "sampling": "annealed"}),
    "pals_proportional": Recipe((1e-4, 5e-5, 2e-4, 2e-5), "pals"),
    "ca_mtl": Recipe((1e-4, 5e-5, 2e-4, 2e-5), "ca_mtl", training=_MIXED),
    "ca_mtl_uncertainty": Recipe((1e-4, 5e-5, 2e-4, 2e-5), "ca_mtl", training={"sampling": "uncertainty"}),
    "source": Recipe((1e-3, 3e-4, 3e-3, 1e-4)),
    "fusion": Recipe((5e-4, 1e-4, 2e-3, 5e-5), combination="fusion"),
    "scalearn": Recipe(_SCALEARN_RATES, combination="scalearn"),
    "scalearn_uniform_pp": Recipe(_SCALEARN_RATES, combination="scalearn_uniform_pp"),
}


def host_for(recipe: str, chosen: str | None) -> str | None:
    """The library of a recipe's adapters: the chosen one, the one closest to the paper, or the one installed."""
    if recipe == "full":
        return None
    if chosen is None and RECIPES[recipe].host == "peft" and importlib.util.find_spec("peft") is not None:
        return "peft"
    return chosen or default_host()


def houlsby_size(base: Any) -> int:
    """The largest bottleneck with which adapters and layer norms stay within the paper's share of the base."""
    width, blocks = base.config.hidden_size, base.config.num_hidden_layers
    total = sum(p.numel() for p in base.parameters())
    norms = (2 * blocks + 1) * 2 * width
    return max(1, int((HOULSBY_SHARE * total - norms - 2 * blocks * width) / (2 * blocks * (2 * width + 1))))


def build(recipe: str, base: Any, tasks: Sequence[Any], host: str | None, pooling: Any) -> TaskHeads:
    """The model of a recipe with a preset."""
    changes: dict[str, Any] = {}
    if recipe == "houlsby":
        size = houlsby_size(base)
        changes = {"hidden_size": size} if host == "peft" else {"reduction_factor": base.config.hidden_size / size}
    preset = RECIPES[recipe].preset
    assert preset is not None
    return get_preset(preset).build(base, tasks, host=host, pooling=pooling, **changes)


def build_source(base: Any, task: Any, host: str, folder: Path) -> tuple[TaskHeads, Any, Any]:
    """A bottleneck (LoRA in PEFT) for one task; also the host's calls and the setup to save."""
    calls = HOSTS[host](base, 16.0, folder)
    setup = calls.add(task.name)
    return _with_head(calls, task, setup), calls, setup


def build_combination(
    base: Any, task: Any, host: str, folder: Path, sources: Sequence[str], method: str
) -> tuple[TaskHeads, Any, Any]:
    """A combination of the sources in a folder."""
    calls = HOSTS[host](base, 16.0, folder)
    for source in sources:
        calls.load(source, folder / source)
    setup = calls.combine(task.name, sources, method)
    return _with_head(calls, task, setup), calls, setup


def _with_head(calls: Any, task: Any, setup: Any) -> TaskHeads:
    model = TaskHeads(calls.model)
    model.add(task.name, task.head_config(), adapter=setup)
    model.prepare_training()
    return model
