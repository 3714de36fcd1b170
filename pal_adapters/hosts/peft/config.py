"""The fields that every method's PEFT config has, and how they select blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig, PeftType, TaskType
from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.blocks.walk import named_modules
from pal_adapters.checks import (
    Check,
    boolean,
    either,
    integer,
    list_of,
    mapping_of,
    one_of,
    option,
    optional,
    shown,
    string,
)
from pal_adapters.errors import ConfigError
from pal_adapters.hosts.method import Options, check_options


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)


_NAMES = Check("a list of names", _are_names)
_NAMES_OR_PATTERN = Check(
    "a list of names, a regular expression or None",
    lambda value: value is None or _are_names(value) or (isinstance(value, str) and _is_pattern(value)),
)
# What PEFT's classes for tasks add to `modules_to_save`, whichever of them the model has.
_HEADS = ("classifier", "score", "qa_outputs")
_INDICES = list_of(integer(0), "block indices from 0")

PEFT_CHECKS: Mapping[str, Check] = {
    "task_type": optional(one_of(*(task.value for task in TaskType))),
    "peft_type": optional(string()),
    "auto_mapping": optional(mapping_of(optional(string()), "class names")),
    "peft_version": optional(string()),
    "base_model_name_or_path": optional(string()),
    "revision": optional(string()),
    "inference_mode": boolean(),
}
"""The fields that PEFT's own base class brings."""


@dataclass
class TaskPeftConfig(Options, PeftConfig):
    """Base class of the PEFT configs.

    Args:
        target_modules: the blocks to adapt: names (`"encoder.layer.0"`), the name of the list that contains them
            (`"encoder.layer"`), or a regular expression that matches the whole name; None for all blocks.
        exclude_modules: the blocks to exclude, in the same forms.
        layers_to_transform: indices of the blocks to adapt, from 0 in each stack.
        layers_pattern: name of the list of blocks to which `layers_to_transform` refers, such as `"layer"`.
        modules_to_save: modules outside the blocks that are trained and saved with the adapter, such as a head.
        init_weights: True for an initialisation that leaves the model's outputs unchanged, False for `N(0, 0.02^2)`.
        train_base: train the pretrained weights in place, together with the adapter, and save and load them with it.
            They are trainable while such an adapter is active. All adapters of a model share one set of pretrained
            weights, so an adapter with a different set is rejected. `disable_adapter` raises, as the original weights
            are gone.
        sites: names of the modules inside the model's blocks, for models with an unknown structure: the fields of
            `BlockSites` plus `"block"`, the class name.
        base_model_type: the base model's `model_type`, such as `"bert"`, set by the package; a saved adapter is
            rejected by a base model of another type, whose tensors may have the same names. None skips the check.
    """

    host: ClassVar[str] = "peft"
    inherited_checks: ClassVar[Mapping[str, Check]] = PEFT_CHECKS

    target_modules: list[str] | str | None = field(
        default=None, metadata=option("Blocks to adapt; all by default.", _NAMES_OR_PATTERN)
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata=option("Blocks to leave out.", _NAMES_OR_PATTERN)
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata=option("Indices of blocks to adapt.", optional(either(integer(0), _INDICES)))
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata=option("Name of the list of blocks.", optional(either(string(), _NAMES)))
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=option("Other modules to train and save.", optional(_NAMES))
    )
    init_weights: bool = field(default=True, metadata=option("Whether a new adapter changes nothing.", boolean()))
    train_base: bool = field(default=False, metadata=option("Train, save and load the pretrained weights.", boolean()))
    sites: dict[str, str] | None = field(
        default=None,
        metadata=option(
            "Names of the modules inside a block.", optional(mapping_of(optional(string()), "module names"))
        ),
    )

    base_model_type: str | None = field(
        default=None, metadata=option("The base model's model_type, filled in.", optional(string()))
    )

    def __post_init__(self) -> None:
        check_options(self)
        super().__post_init__()
        self._saved_model_type = self.base_model_type
        own = PeftType(self.method.name.upper())
        if self.peft_type not in (None, own):
            raise ConfigError(f"peft_type={shown(self.peft_type)} is not allowed here: leave it out.")
        self.peft_type = own
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: pass both or none."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                f"layers_to_transform={self.layers_to_transform!r} has no effect with target_modules="
                f"{self.target_modules!r}: a regular expression already selects the blocks."
            )
        if self.init_weights and not self.method.identity:
            raise ConfigError(
                f"init_weights=True is not allowed: {self.method.name} has no initialisation that leaves the model as "
                "it is. Use init_weights=False."
            )
        self.validate()

    def check_base_model(self, model_config: Mapping[str, Any]) -> None:
        """Note the type of the base model; raise `ConfigError` if the adapter was saved for another one."""
        found = model_config.get("model_type")
        if self._saved_model_type is not None and found not in (None, "custom", self._saved_model_type):
            raise ConfigError(
                f"the adapter was saved for a base model of type {self._saved_model_type!r}, and this one is of type "
                f"{found!r}: load it into the base model it was trained on, or set base_model_type=None in its config "
                "if both have the same weights."
            )
        self.base_model_type = None if found == "custom" else found

    @property
    def identity_init(self) -> bool:
        return self.init_weights

    @property
    def init_weights_seed(self) -> None:
        return None


def _matches(name: str, pattern: str) -> bool:
    container = name.rpartition(".")[0]
    return any(n == pattern or n.endswith(f".{pattern}") for n in (name, container))


def _matches_inside(name: str, pattern: str) -> bool:
    return f".{name}.".find(f".{pattern}.") >= 0


def names_blocks(target_modules: Any, blocks: list[Block]) -> bool:
    """Whether `target_modules` names blocks (None: all of them) rather than modules inside blocks."""
    if target_modules is None:
        return True
    if isinstance(target_modules, str):
        return any(re.fullmatch(target_modules, block.name) for block in blocks)
    return any(_matches(block.name, pattern) for block in blocks for pattern in target_modules)


def _named(names: Iterable[str], argument: str, patterns: Any) -> set[str]:
    names = list(names)
    if isinstance(patterns, str):
        if patterns.lower() == "all-linear":
            raise ConfigError(
                f"{argument}='all-linear' is not allowed: this method adapts blocks, see `target_modules`."
            )
        return {n for n in names if re.fullmatch(patterns, n)}
    chosen: set[str] = set()
    for pattern in sorted(patterns):
        found = {n for n in names if _matches(n, pattern)}
        if not found:
            raise ConfigError(
                f"{argument} has {pattern!r}, which names no block: use block names such as {names[0]!r}, or the name "
                f"of the list that contains them, such as {names[0].rpartition('.')[0]!r}."
            )
        chosen |= found
    return chosen


def chooses(config: TaskPeftConfig) -> bool:
    """Whether a config says itself which blocks it adapts."""
    fields = (config.target_modules, config.exclude_modules, config.layers_to_transform, config.sites)
    return any(value is not None for value in fields)


def check_kept_modules(config: Any, model: nn.Module) -> None:
    """Reject `modules_to_save` that name no module, which PEFT ignores: the head would stay untrained.

    Raises:
        ConfigError: if a name is not the end of a module's name.
    """
    wanted = [kept for kept in config.modules_to_save or () if kept not in _HEADS]
    names = [name for name in named_modules(model, units=False) if name] if wanted else []
    for kept in wanted:
        if not any(name.endswith(kept) for name in names):
            top = [name for name, _ in model.named_children()]
            raise ConfigError(
                f"modules_to_save has {kept!r}, which names no module: use the name of a module of the model or its "
                f"end; the model's own parts are {top}."
            )


def choose_blocks(config: TaskPeftConfig, blocks: list[Block]) -> tuple[list[Block], set[str]]:
    """The blocks that a config adapts, and the names of those it excludes.

    Raises:
        ConfigError: if a name matches no block, or no stack has an index.
    """
    chosen = list(blocks)
    if config.target_modules is not None:
        names = _named((b.name for b in blocks), "target_modules", config.target_modules)
        chosen = [b for b in chosen if b.name in names]
    excluded: set[str] = set()
    if config.exclude_modules:
        excluded = _named((b.name for b in blocks), "exclude_modules", config.exclude_modules)
        chosen = [b for b in chosen if b.name not in excluded]
    # As elsewhere in PEFT, modules that are trained and saved as a whole get no adapter.
    saved = {b.name for b in chosen for name in config.modules_to_save or () if _matches_inside(b.name, name)}
    excluded |= saved
    chosen = [b for b in chosen if b.name not in saved]
    if config.layers_to_transform is not None:
        indices = config.layers_to_transform
        indices = [indices] if isinstance(indices, int) else list(indices)
        patterns = config.layers_pattern or []
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        known = {b.index for b in blocks}
        bad = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or i not in known]
        if bad:
            raise ConfigError(
                f"layers_to_transform={config.layers_to_transform!r} is not allowed: there is no block {bad[0]!r}, "
                f"the blocks are 0 to {max(known)}."
            )
        if patterns:
            chosen = [b for b in chosen if any(_matches(b.name.rpartition(".")[0], p) for p in patterns)]
        chosen = [b for b in chosen if b.index in indices]
    if not chosen:
        raise ConfigError(
            f"no block is left to adapt: target_modules={config.target_modules!r}, exclude_modules="
            f"{config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r}, layers_pattern="
            f"{config.layers_pattern!r}; the model's blocks are {blocks[0].name!r} to {blocks[-1].name!r}."
        )
    return chosen, excluded
