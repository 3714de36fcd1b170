"""The fusion config of ScaLearn in `adapters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pal_adapters.checks import check_fields, either, list_of, mapping_of, number, one_of, option, optional, shown
from pal_adapters.errors import ConfigError
from pal_adapters.fusion.config import ALIASES, VARIANTS, ScaLearnOptions
from pal_adapters.fusion.layer import Scales, regularization
from pal_adapters.hosts.adapters.fusion import HOST_ONLY, Combination, CombinationConfig
from pal_adapters.hosts.adapters.patches import register_fusion

_COEFFICIENT = number(-1e6)
_FIXED = either(mapping_of(_COEFFICIENT, "numbers"), list_of(_COEFFICIENT, "numbers"))


@dataclass(eq=False)
class ScaLearnConfig(ScaLearnOptions, CombinationConfig):
    r"""ScaLearn: `model.add_adapter_fusion(["mnli", "qqp"], config=ScaLearnConfig())`, or the name of a variant.

    $$y = \mathrm{LN}\Big(h_1 + o_2 + \sum_s D(\omega_s) \odot a_s\Big)$$

    Its options are those of `pal_adapters.fusion.config.ScaLearnOptions`, and `fixed`. Sources may be any bottlenecks
    of the host, with one place or two per block, and PAL or low-rank modules. The authors' code does not save
    shared coefficients; here they are saved and restored.

    Args:
        fixed: fixed coefficients, for probing: `{source: number}`, or one number per source in the order of the
            sources. They are the same for all channels and blocks.
        architecture: identifies the config in a file.
        key: this and the fields below belong to the host's AdapterFusion and cannot be changed.
        query: see `key`.
        value: see `key`.
        query_before_ln: see `key`.
        residual_before: see `key`.
        temperature: see `key`.
        value_before_softmax: see `key`.
        value_initialized: see `key`.
        dropout_prob: see `key`.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """

    fixed: dict[str, float] | list[float] | None = field(
        default=None, metadata=option("Coefficients that do not train.", optional(_FIXED))
    )
    architecture: str | None = field(default="scalearn", metadata=option("The fusion.", one_of("scalearn")))
    key: bool = False
    query: bool = False
    value: bool = False
    query_before_ln: bool = False
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: bool = False
    value_initialized: str = ""
    dropout_prob: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fixed is not None:
            self._check_fixed()
        self.complete()
        for name in HOST_ONLY:
            value, only = getattr(self, name), type(self).__dataclass_fields__[name].default
            if type(value) is not type(only) or value != only:
                raise ConfigError(f"{name}={shown(value)} is not allowed: ScaLearn does not use it, leave it out.")

    def _check_fixed(self) -> None:
        if not self.fixed:
            raise ConfigError(f"fixed={self.fixed!r} is not allowed: name at least one source.")
        for name in ("init_scale", "init_std", "regularization", "regularization_form"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"{name}={getattr(self, name)!r} has no effect on fixed coefficients: leave it out.")
        if self.omega_dropout:
            raise ConfigError(
                f"omega_dropout={self.omega_dropout!r} is not allowed: fixed coefficients have no dropout."
            )
        if self.variant not in ("scalearn", "scalearn_uniform_pp", "scalearn_uniform++"):
            raise ConfigError(
                f"variant={self.variant!r} has no effect on fixed coefficients, one per source: leave it out."
            )
        object.__setattr__(self, "variant", "scalearn_uniform_pp")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ScaLearnConfig:
        # The host keeps unknown names as attributes, so a misspelt one would be ignored.
        for key, value in config.items():
            if key not in cls.__dataclass_fields__:
                raise ConfigError(
                    f"{key}={value!r} is not an argument of ScaLearnConfig: use {', '.join(_OWN_FIELDS)}."
                )
        return super().from_dict(config)

    def build(self, names: Sequence[str], width: int) -> ScaLearnLayer:
        return ScaLearnLayer(self, names, width)

    def fixed_values(self, names: Sequence[str]) -> list[float]:
        """The fixed coefficients in the order of the sources.

        Raises:
            ConfigError: if there is not one for each source.
        """
        fixed = self.fixed
        if isinstance(fixed, Mapping):
            if fixed.keys() != set(names):
                raise ConfigError(
                    f"fixed={dict(fixed)} is not allowed: give one number for each of {', '.join(names)}."
                )
            return [float(fixed[name]) for name in names]
        if fixed is None or len(fixed) != len(names):
            raise ConfigError(f"fixed={fixed} is not allowed: give {len(names)} numbers, for {', '.join(names)}.")
        return [float(value) for value in fixed]


_OWN_FIELDS = [name for name in ScaLearnConfig.__dataclass_fields__ if name not in HOST_ONLY]


class ScaLearnLayer(Scales, Combination):
    """The coefficients of one place in a block: `omega` `[S, d]` or `[S, 1]`, a parameter, or a buffer if fixed.

    Args:
        config: the fusion's config.
        names: the sources, in the order of the rows.
        width: `d`.
    """

    def __init__(self, config: ScaLearnConfig, names: Sequence[str], width: int) -> None:
        per_channel, own, _ = VARIANTS[config.variant]
        super().__init__(
            len(names),
            width if per_channel else 1,
            init_scale=config.init_scale,
            init_std=config.init_std,
            dropout=config.omega_dropout or 0.0,
            ablation=config.ablation,  # type: ignore[arg-type]
        )
        self.config = config
        if config.fixed is not None:
            self.start = None
        self.names = tuple(names)
        self.shared = not own
        self.penalised = config.regularization > 0
        # In a tuple, so that another place's coefficients are neither registered nor saved here.
        self._owner: tuple[ScaLearnLayer, ...] = ()
        if config.fixed is not None:
            values = config.fixed_values(names)
            del self.omega
            self.register_buffer("omega", torch.tensor(values)[:, None])

    def share(self, owner: Combination) -> None:
        assert isinstance(owner, ScaLearnLayer)
        if owner.get_omega().shape != (len(self.names), self.get_omega().shape[1]):
            raise ConfigError(
                f"variant={self.config.variant!r} is not allowed: the blocks have the widths "
                f"{owner.get_omega().shape[1]} and {self.get_omega().shape[1]} and cannot share coefficients. Use "
                "'scalearn' or 'scalearn_uniform_pp'."
            )
        if not self._owner:
            del self.omega
        self._owner = (owner,)

    def get_omega(self) -> Tensor:
        """`omega`, `[S, d]` or `[S, 1]`, wherever it is registered."""
        return self._owner[0].omega if self._owner else self.omega

    def forward(self) -> Tensor:
        return self.coefficients(self.get_omega())

    def penalty(self) -> Tensor | None:
        if self._owner or self.config.regularization == 0 or not self.omega.requires_grad:
            return None
        return regularization([self.omega], self.config.regularization, self.config.regularization_form)


PRESETS = {name: ScaLearnConfig(variant=name) for name in VARIANTS}
PRESETS |= {alias: PRESETS[name] for alias, name in ALIASES.items()}
register_fusion(ScaLearnConfig, PRESETS)
