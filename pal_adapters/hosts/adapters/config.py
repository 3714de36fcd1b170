"""The fields that every method's config has in `adapters`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any, ClassVar

from adapters.configuration import (
    AdapterConfig,
    BnConfig,
    ConfigUnion,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)

from pal_adapters.checks import boolean, integer, list_of, mapping_of, option, optional, require_one_of, string
from pal_adapters.errors import ConfigError
from pal_adapters.hosts.method import REGISTERED, Options, check_options

# The config class of each method by its architecture; `registration.register` fills it.
CONFIGS: dict[str, type[Options]] = REGISTERED["adapters"]


_HOSTS = (BnConfig, LoRAConfig, PrefixTuningConfig, PromptTuningConfig)
_OTHERS = {name for config in _HOSTS for name in config.__dataclass_fields__}


@dataclass(eq=False)
class TaskAdapterConfig(Options, AdapterConfig):
    """Base of our configs in `adapters`.

    Args:
        leave_out: indices of the blocks, from 0, that get no module.
        init_weights: see the subclass.
        init_weights_seed: gives two adapters with one seed equal weights; blocks still differ.
        train_base: train the pretrained weights together with the adapter (`joint`); they are saved and loaded with
            it.
        sites: names of the modules inside the model's blocks, for a model whose structure is not known: the fields of
            `BlockSites` plus `"block"`, the class name.
    """

    host: ClassVar[str] = "adapters"
    init_choices: ClassVar[tuple[str, ...]] = ("zero_decoder", "bert")

    leave_out: list[int] = field(
        default_factory=list,
        metadata=option("Blocks that get no module.", list_of(integer(0), "block indices from 0")),
    )
    init_weights: str = field(default="zero_decoder", metadata=option("How new weights are drawn.", string()))
    init_weights_seed: int | None = field(
        default=None, metadata=option("Seed of the initialisation.", optional(integer(0, 2**32 - 1)))
    )
    train_base: bool = field(default=False, metadata=option("Train the pretrained weights too.", boolean()))
    sites: dict[str, str] | None = field(
        default=None,
        metadata=option(
            "Names of the modules inside a block.", optional(mapping_of(optional(string()), "module names"))
        ),
    )
    architecture: str | None = field(default=None, metadata=option("The method.", optional(string())))

    def __post_init__(self) -> None:
        if self.architecture != self.method.name:
            raise ConfigError(f"architecture={self.architecture!r} is not allowed here: use {self.method.name!r}.")
        check_options(self)
        require_one_of("init_weights", self.init_weights, self.init_choices)
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        # The host lets a config take attributes of any name, so that another method's argument would be ignored.
        if name in _OTHERS and name not in self.__dataclass_fields__:
            raise FrozenInstanceError(f"{name} is not an argument of {type(self).__name__}.")
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TaskAdapterConfig:
        # The host keeps names that it does not know as attributes, so that a misspelt one would be ignored.
        unknown = [] if isinstance(config, AdapterConfig) else [k for k in config if k not in cls.__dataclass_fields__]
        if unknown:
            allowed = ", ".join(cls.__dataclass_fields__)
            key, value = unknown[0], config[unknown[0]]
            raise ConfigError(f"{key}={value!r} is not an argument of {cls.__name__}: use {allowed}.")
        return super().from_dict(config)

    @property
    def identity_init(self) -> bool:
        return self.init_weights != "bert"

    def __getitem__(self, key: str) -> Any:
        # Read by the host when it fuses adapters, though these are no options here.
        if (
            self.method.fusable
            and key in ("output_adapter", "mh_adapter", "cross_adapter")
            and key not in self.__dict__
        ):
            return key == "output_adapter"
        return super().__getitem__(key)


def task_configs(config: Mapping[str, Any] | None) -> Iterator[TaskAdapterConfig]:
    """Our configs in an adapter's config: itself, or members of a union."""
    if config is not None and not isinstance(config, AdapterConfig):
        config = AdapterConfig.load(config)  # as a model's own config file gives it
    if isinstance(config, TaskAdapterConfig):
        yield config
    elif isinstance(config, ConfigUnion):
        for member in config.configs:
            yield from task_configs(member)


def is_ours(architectures: Iterable[str | None]) -> bool:
    """Whether one of these architectures of an adapter is a method of ours."""
    return any(name in CONFIGS for name in architectures)
