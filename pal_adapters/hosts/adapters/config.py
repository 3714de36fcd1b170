"""The options that every method has in `adapters`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Any, ClassVar

from adapters.configuration import (
    AdapterConfig,
    BnConfig,
    ConfigUnion,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)

from pal_adapters.checks import (
    Check,
    boolean,
    integer,
    list_of,
    mapping_of,
    option,
    optional,
    require_one_of,
    shown,
    string,
)
from pal_adapters.errors import ConfigError
from pal_adapters.hosts.method import REGISTERED, Options, check_options, filled

# The config class of each method by its architecture, filled by `registration.register`.
CONFIGS: dict[str, type[Options]] = REGISTERED["adapters"]


_HOST_CONFIGS = (BnConfig, LoRAConfig, PrefixTuningConfig, PromptTuningConfig)
_HOST_OPTIONS = {name for config in _HOST_CONFIGS for name in config.__dataclass_fields__}

_ANYTHING = Check("any value", lambda value: True)


@dataclass(eq=False)
class TaskAdapterConfig(Options, AdapterConfig):
    """Base of every method's config in `adapters`.

    Args:
        leave_out: indices of the blocks, from 0, that get no module.
        init_weights: see the subclass.
        init_weights_seed: two adapters with the same seed get equal weights; the blocks of one still differ.
        train_base: train the pretrained weights together with the adapter (`joint`); they are saved and loaded with
            it.
        sites: module names inside the model's blocks, for a model of unknown structure: the fields of `BlockSites`
            plus `"block"`, the class name.
        chosen: set by the package, not by the user: the values that were chosen for options left at None when the
            adapter was added, such as `{"hidden_size": 204}`. They are saved with the adapter, so that it is rebuilt
            with the same sizes.
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
    chosen: dict[str, Any] | None = field(
        default=None,
        metadata=option("Values chosen for the model.", optional(mapping_of(_ANYTHING, "values chosen for options"))),
    )
    architecture: str | None = field(default=None, metadata=option("The method.", optional(string())))

    def __post_init__(self) -> None:
        check_options(self)
        if self.architecture != self.method.name:
            raise ConfigError(
                f"architecture={shown(self.architecture)} is not allowed here: use {self.method.name!r}."
            )
        require_one_of("init_weights", self.init_weights, self.init_choices)
        self.validate()
        if self.chosen is not None:
            self._check_chosen(self.chosen)

    def _check_chosen(self, chosen: Mapping[str, Any]) -> None:
        names = {f.name for f in fields(self)}
        if not all(name in names and getattr(self, name) is None for name in chosen):
            raise ConfigError(
                f"chosen={shown(chosen)} is not allowed: it holds the values that were chosen for options left at "
                "None. Leave it out."
            )
        replace(self, **{**chosen, "chosen": None})  # checks the values

    def resolved(self) -> TaskAdapterConfig:
        """This config with the chosen values in place of None; it shares its lists with this one."""
        made: TaskAdapterConfig = filled(self, {**self.chosen, "chosen": None}) if self.chosen else self
        return made

    def __eq__(self, other: object) -> bool:
        """Whether both configs ask for the same; values chosen for a model do not count."""
        if not isinstance(other, TaskAdapterConfig):
            return False
        return {**self.to_dict(), "chosen": None} == {**other.to_dict(), "chosen": None}

    def __setattr__(self, name: str, value: Any) -> None:
        # The host accepts attributes of any name, so another method's argument would be silently ignored.
        if name in _HOST_OPTIONS and name not in self.__dataclass_fields__:
            raise FrozenInstanceError(f"{name} is not an argument of {type(self).__name__}.")
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TaskAdapterConfig:
        # The host keeps unknown names as attributes, so a misspelt one would be silently ignored.
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
        # The host reads these when it fuses adapters, although they are not options here.
        if (
            self.method.fusable
            and key in ("output_adapter", "mh_adapter", "cross_adapter")
            and key not in self.__dict__
        ):
            return key == "output_adapter"
        return super().__getitem__(key)


def given_configs(config: Mapping[str, Any] | None) -> Iterator[TaskAdapterConfig]:
    """The configs of this package in an adapter's config, as the user gave them: itself, or members of a union."""
    if config is not None and not isinstance(config, AdapterConfig):
        config = AdapterConfig.load(config)  # a dict, from the config file of a whole model
    if isinstance(config, TaskAdapterConfig):
        yield config
    elif isinstance(config, ConfigUnion):
        for member in config.configs:
            yield from given_configs(member)


def task_configs(config: Mapping[str, Any] | None) -> Iterator[TaskAdapterConfig]:
    """The same, with the values that were chosen for the model in place of None."""
    for given in given_configs(config):
        yield given.resolved()


def fusable_methods() -> list[str]:
    """The methods whose adapters can be sources of a fusion."""
    return [name for name, config in CONFIGS.items() if config.method.fusable]


def any_registered(architectures: Iterable[str | None]) -> bool:
    """Whether one of these architectures of an adapter is a method of this package."""
    return any(name in CONFIGS for name in architectures)
