"""The papers' recipes by name: adapters, trainable parameters, task sampling and optimizer settings."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers

from pal_adapters.checks import require_one_of
from pal_adapters.errors import ConfigError
from pal_adapters.hosts.which import host_of
from pal_adapters.multitask.model.heads import POOLINGS, Pooling
from pal_adapters.multitask.model.routes import adapter_config, adapter_names
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.tasks.task import Task, check_tasks
from pal_adapters.multitask.training.arguments import MultiTaskTrainingArguments

from .defaults import HOSTS, add_adapter, default_host

SHARED = "tasks"
"""Name of the adapter that all tasks of a recipe share, such as a CA-MTL network."""


class RecipeWarning(UserWarning):
    """A preset is used without a setting on which its results depend."""


@dataclass(frozen=True)
class Preset:
    """A training recipe from a paper.

    Args:
        name: Its name.
        source: The paper.
        base: Whether the base model is `"trained"` with the adapters or `"frozen"`.
        adapters: `"task"` for one adapter per task, `"shared"` for one network for all tasks, `"combination"` for a
            combination of existing sources per task, or `"none"`.
        config: For each host, the name of the adapter's config class in `pal_adapters` and its arguments.
        arguments: Training arguments.
        pooling: Pooling of the heads, see `HeadConfig`; `"pooler"` means `"first"` for a base model without a pooler.
        steps_per_task: Steps per epoch for each task; 0 for one pass over the data.
        needs: Training arguments that the results of the recipe depend on, with their values.
    """

    name: str
    source: str
    base: str
    adapters: str
    config: Mapping[str, tuple[str, Mapping[str, Any]]]
    arguments: Mapping[str, Any]
    pooling: Pooling = "mean"
    steps_per_task: int = 0
    needs: Mapping[str, Any] = field(default_factory=dict)

    def build(
        self,
        base: Any,
        tasks: Iterable[Task],
        *,
        host: str | None = None,
        pooling: Pooling | None = None,
        sources: Sequence[str] | Mapping[str, str] | None = None,
        **changes: Any,
    ) -> TaskHeads:
        """Builds the recipe's model: a base model with adapters and heads, and only the recipe's parameters trainable.

        Args:
            base: A `transformers` model, changed in place. For a recipe that combines sources, it may hold them.
            tasks: The tasks.
            host: `"adapters"` or `"peft"`, for recipes with adapters; by default the first installed one.
            pooling: Replaces the recipe's `pooling`; see `HeadConfig`.
                A task with its own `pooling` or `head` keeps it.
            sources: The sources that a recipe combines: folders of saved adapters by name or, in `adapters`, names of
                adapters on the base model.
            **changes: Arguments of the adapter's config to override.

        Raises:
            ConfigError: For conflicting arguments.
        """
        named = check_tasks(tasks)
        if pooling is not None:
            require_one_of("pooling", pooling, POOLINGS)
        combines = self.adapters == "combination"
        if host_of(base) is not None and not combines:
            raise ConfigError(f"base already has adapters: pass a plain model to the preset {self.name!r}.")
        if combines is not bool(sources):
            raise ConfigError(
                f"sources={sources!r} is not allowed for the preset {self.name!r}, which "
                f"{'combines sources: pass them' if combines else 'combines none: leave it out'}."
            )
        routes: dict[str, Any] = {}
        if combines:
            backbone, routes = self._combine(base, tuple(named), sources or (), host, changes)
        elif self.adapters == "none":
            if host is not None or changes:
                given = f"host={host!r}" if host is not None else next(iter(changes))
                raise ConfigError(f"{given} has no effect for the preset {self.name!r}, which adds no adapters.")
            backbone = base
        else:
            require_one_of("host", host or default_host(), HOSTS)
            backbone = self._add_adapters(base, tuple(named), host or default_host(), changes)
        model = TaskHeads(backbone)
        if pooling is None:
            pooling = self.pooling
            if pooling == "pooler" and getattr(base, "pooler", None) is None:
                pooling = "first"
        for name, task in named.items():
            head = task.head_config()
            if task.pooling == "mean" and not head.reads_tokens:  # the default, so the recipe decides
                head = type(head)(**{**vars(head), "pooling": pooling})
            adapter = {"task": name, "shared": SHARED, "none": None, "combination": routes.get(name)}[self.adapters]
            model.add(name, task.head or head, adapter=adapter, weight=task.weight, loss=task.loss)
        model.prepare_training(base=self.base == "trained")
        return model

    def _add_adapters(self, base: Any, tasks: tuple[str, ...], host: str, changes: Mapping[str, Any]) -> Any:
        name, options = self.config[host]
        names = tasks if self.adapters == "task" else (SHARED,)
        given = {**options, **changes, **({"tasks": list(tasks)} if self.adapters == "shared" else {})}
        make = _config_maker(name)
        if host == "peft":
            given["task_type"] = "FEATURE_EXTRACTION"
        for adapter in names:
            base = add_adapter(base, adapter, make(**given))
        return base

    def _combine(
        self,
        base: Any,
        tasks: tuple[str, ...],
        sources: Sequence[str] | Mapping[str, str],
        host: str | None,
        changes: Mapping[str, Any],
    ) -> tuple[Any, dict[str, Any]]:
        """The model with a combination of the sources for each task, and the adapter of each task."""
        there = host_of(base)
        if there is not None and host not in (None, there):
            raise ConfigError(f"host={host!r} is not allowed: the base has adapters of {there!r}.")
        host = there or host or default_host()
        require_one_of("host", host, HOSTS)
        name, options = self.config[host]
        config = _config_maker(name)
        routes: dict[str, Any] = {}
        if host == "peft":
            if not isinstance(sources, Mapping) or there is not None:
                raise ConfigError(
                    f"sources={sources!r} on a {type(base).__name__} is not allowed: PEFT allows one kind of adapter "
                    "on a model, so pass a plain base model and the folders of the sources, {name: folder}."
                )
            for task in tasks:
                given = {**options, **changes, "adapters": sources, "task_type": "FEATURE_EXTRACTION"}
                base = add_adapter(base, f"to_{task}", config(**given))
                routes[task] = f"to_{task}"
            return base, routes
        import adapters  # only here: not needed with PEFT
        from adapters.composition import Fuse

        if there is None:
            adapters.init(base)
        for source, folder in sources.items() if isinstance(sources, Mapping) else ():
            base.load_adapter(folder, load_as=source, use_safetensors=True)
        for task in tasks:
            routes[task] = Fuse(*sources, name=f"to_{task}")
            base.add_adapter_fusion(routes[task], config=config(**{**options, **changes}))
        return base, routes

    def training_arguments(self, output_dir: str, *, num_tasks: int, **changes: Any) -> MultiTaskTrainingArguments:
        """The training arguments of the recipe.

        Args:
            output_dir: Folder for the checkpoints.
            num_tasks: Number of tasks, on which the length of an epoch may depend.
            **changes: Arguments to override. Overriding one that the results depend on gives a `RecipeWarning`.
        """
        arguments = {**self.arguments}
        if self.steps_per_task:
            arguments["steps_per_epoch"] = self.steps_per_task * num_tasks
        arguments |= changes
        self._warn_of_needs(arguments)
        if "warmup_ratio" in arguments and not transformers.__version__.startswith("4."):
            # transformers 5 has one argument for both: a value below 1 is a ratio.
            arguments["warmup_steps"] = arguments.pop("warmup_ratio")
        return MultiTaskTrainingArguments(output_dir=output_dir, **arguments)

    def _warn_of_needs(self, arguments: Mapping[str, Any]) -> None:
        for name, needed in self.needs.items():
            if arguments.get(name) != needed:
                warnings.warn(
                    f"{name}={arguments.get(name)!r} with the preset {self.name!r}, whose results depend on "
                    f"{name}={needed!r} ({self.source}).",
                    RecipeWarning,
                    stacklevel=3,
                )

    def check(self, model: TaskHeads, arguments: MultiTaskTrainingArguments | None = None) -> None:
        """Gives a `RecipeWarning` if the model or the training arguments differ from the recipe.

        Args:
            model: The model.
            arguments: The training arguments.
        """
        if arguments is not None:
            self._warn_of_needs({name: getattr(arguments, name) for name in self.needs})
        trains = model.base_trains()
        if trains is not (self.base == "trained"):
            warnings.warn(
                f"the base is {'trained' if trains else 'frozen'} with the preset {self.name!r}, in which it is "
                f"{self.base} ({self.source}).",
                RecipeWarning,
                stacklevel=2,
            )
        shared = adapter_config(model.backbone, SHARED) if SHARED in adapter_names(model.backbone) else None
        if self.adapters == "shared" and getattr(shared, "freeze_layers", None) == []:
            warnings.warn(
                f"freeze_layers=[] with the preset {self.name!r}, whose results depend on frozen lower blocks "
                f"({self.source}).",
                RecipeWarning,
                stacklevel=2,
            )


def _config_maker(name: str) -> Callable[..., Any]:
    """A config class, or a preset of one (`Class:preset`), from `pal_adapters` or, if its name is dotted, a host."""
    name, _, preset = name.partition(":")
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module or "pal_adapters"), attribute)
    if not preset:
        return found
    return lambda **options: found.preset(preset, **options)


_BERT = {"weight_decay": 0.01, "adam_epsilon": 1e-6, "warmup_ratio": 0.1}
_PALS = {
    **_BERT,
    "sampling": "annealed",
    "learning_rate": 2e-5,
    "num_train_epochs": 25,
    "per_device_train_batch_size": 32,
    "adam_bias_correction": False,
    "max_tensor_grad_norm": 1.0,
    "schedule": "pals",
    "max_length": 128,
    "seed": 42,
}
_FROZEN = {
    "sampling": "annealed",
    "learning_rate": 1e-3,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 32,
    "weight_decay": 0.01,
    "warmup_ratio": 0.1,
    "max_length": 128,
    "seed": 42,
}
_SCALEARN = {
    "sampling": "proportional",
    "num_train_epochs": 30,
    "per_device_train_batch_size": 32,
    "weight_decay": 0.0,
    "max_length": 128,
}
_PALS_SOURCE = "Stickland and Murray, BERT and PALs, ICML 2019"


def _both(stem: str, **options: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    return {"adapters": (f"{stem}Config", options), "peft": (f"{stem}PeftConfig", options)}


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "pals", _PALS_SOURCE, "trained", "task", _both("PAL"), _PALS,
            pooling="pooler", steps_per_task=300, needs={"sampling": "annealed"},
        ),
        Preset("pals_frozen", f"{_PALS_SOURCE}, base frozen", "frozen", "task", _both("PAL"), _FROZEN),
        Preset("low_rank_frozen", f"{_PALS_SOURCE}, base frozen", "frozen", "task", _both("LowRank"), _FROZEN),
        Preset(
            "full", f"{_PALS_SOURCE}: one model for all tasks, without task modules", "trained", "none", {}, _PALS,
            pooling="pooler", steps_per_task=300,
        ),
        Preset(
            "houlsby", "Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019", "frozen", "task",
            {
                "adapters": (
                    "adapters.DoubleSeqBnConfig",
                    {"non_linearity": "gelu", "reduction_factor": 12, "init_weights": "houlsby"},
                ),
                "peft": ("HoulsbyPeftConfig", {}),
            },
            {**_FROZEN, "sampling": "proportional", "learning_rate": 3e-4, "num_train_epochs": 20},
            pooling="pooler",
        ),
        Preset(
            "ca_mtl", "Pilault et al., Conditionally Adaptive Multi-Task Learning, ICLR 2021", "frozen", "shared",
            {"adapters": ("CAMTLConfig:ca_mtl_base", {}), "peft": ("CAMTLPeftConfig:ca_mtl_base", {})},
            {
                "sampling": "uncertainty", "learning_rate": 2e-5, "num_train_epochs": 5, "warmup_ratio": 0.1,
                "per_device_train_batch_size": 32, "max_length": 128, "seed": 12,
            },
            pooling="pooler", needs={"sampling": "uncertainty"},
        ),
        Preset(
            "scalearn_sources", "Frohmann et al., ScaLearn, ACL Findings 2024: the first stage", "frozen", "task",
            {
                "adapters": ("adapters.SeqBnConfig", {}),
                "peft": ("peft.LoraConfig", {"r": 8, "target_modules": "all-linear"}),
            },
            {**_SCALEARN, "learning_rate": 3e-4}, pooling="first",
        ),
        Preset(
            "scalearn", "Frohmann et al., ScaLearn, ACL Findings 2024: the second stage", "frozen", "combination",
            {"adapters": ("ScaLearnConfig", {}), "peft": ("ScaLearnPeftConfig", {})},
            {
                **_SCALEARN, "learning_rate": 6e-3, "eval_strategy": "epoch", "save_strategy": "epoch",
                "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False,
            },
            pooling="first",
        ),
    )
}  # fmt: skip
"""The recipes by name."""


def get_preset(name: str) -> Preset:
    """The recipe of that name.

    Raises:
        ConfigError: If there is no such recipe.
    """
    require_one_of("preset", name, tuple(PRESETS))
    return PRESETS[name]
