"""The fields that every method's config has in PEFT, and how they choose blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig, PeftType

from pal_adapters.blocks.sites import Block, parse_sites
from pal_adapters.checks import require_bool
from pal_adapters.errors import ConfigError
from pal_adapters.hosts.method import Method


@dataclass
class TaskPeftConfig(PeftConfig):
    """Base of our configs in PEFT.

    Args:
        target_modules: the blocks to adapt, by name (`"encoder.layer.0"`), by the name of the list that holds them
            (`"encoder.layer"`) or by a regular expression that matches the whole name; None for all blocks.
        exclude_modules: blocks to leave out, in the same forms.
        layers_to_transform: indices of the blocks to adapt, from 0 in each stack.
        layers_pattern: name of the list of blocks that `layers_to_transform` counts in, such as `"layer"`.
        modules_to_save: modules outside the blocks that are trained and saved with the adapter, such as a head.
        init_weights: True for an initialisation that leaves the model as it is, False for `N(0, 0.02^2)`.
        train_base: train the pretrained weights together with the adapter (`joint`); they are saved and loaded with
            it. They train while such an adapter is active. All adapters of a model compute with one set of them, so
            loading another set for one of several is refused.
        sites: names of the modules inside the model's blocks, for a model whose structure is not known: the fields of
            `BlockSites` plus `"block"`, the class name.
    """

    method: ClassVar[Method]
    # Whether `train_base` trains copies that belong to the adapter, and leaves the model's own weights alone.
    copies_base: ClassVar[bool] = False

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Blocks to adapt; all by default."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Blocks to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    init_weights: bool = field(default=True, metadata={"help": "Whether the fresh adapter changes nothing."})
    train_base: bool = field(default=False, metadata={"help": "Train, save and load the pretrained weights too."})
    sites: dict[str, str] | None = field(default=None, metadata={"help": "Names of the modules inside a block."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method.name.upper())
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        require_bool("init_weights", self.init_weights)
        require_bool("train_base", self.train_base)
        _require_names("target_modules", self.target_modules)
        _require_names("exclude_modules", self.exclude_modules)
        _require_names("layers_pattern", self.layers_pattern)
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save={self.modules_to_save!r} is not allowed: pass a list of module names.")
        _require_names("modules_to_save", self.modules_to_save)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: pass both or none."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                f"layers_to_transform={self.layers_to_transform!r} has no effect with target_modules="
                f"{self.target_modules!r}: a regular expression names the blocks by itself."
            )
        if self.sites is not None:
            parse_sites(self.sites)

    @property
    def identity_init(self) -> bool:
        return self.init_weights

    @property
    def init_weights_seed(self) -> None:
        return None


def _require_names(argument: str, value: Any) -> None:
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{argument}={value!r} is not allowed: use a list of names, a regular expression or None.")


def _matches(name: str, pattern: str) -> bool:
    container = name.rpartition(".")[0]
    return any(n == pattern or n.endswith(f".{pattern}") for n in (name, container))


def _matches_inside(name: str, pattern: str) -> bool:
    return f".{name}.".find(f".{pattern}.") >= 0


def names_blocks(target_modules: Any, blocks: list[Block]) -> bool:
    """Whether `target_modules` names blocks (None: all of them) rather than modules inside."""
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
                f"of the list that holds them, such as {names[0].rpartition('.')[0]!r}."
            )
        chosen |= found
    return chosen


def choose_blocks(config: TaskPeftConfig, blocks: list[Block]) -> tuple[list[Block], set[str]]:
    """The blocks that a config adapts, and the names of those that it leaves out on purpose.

    Raises:
        ConfigError: for names that match no block and indices that no stack has.
    """
    chosen = list(blocks)
    if config.target_modules is not None:
        names = _named((b.name for b in blocks), "target_modules", config.target_modules)
        chosen = [b for b in chosen if b.name in names]
    excluded: set[str] = set()
    if config.exclude_modules:
        excluded = _named((b.name for b in blocks), "exclude_modules", config.exclude_modules)
        chosen = [b for b in chosen if b.name not in excluded]
    # As everywhere in PEFT: what is trained and saved as a whole gets no adapter.
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
                f"layers_to_transform={config.layers_to_transform!r} is not allowed: {bad[0]!r} is no block, the "
                f"blocks are 0 to {max(known)}."
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
