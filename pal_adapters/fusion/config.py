"""The four sizes of ScaLearn, and the checks that its configs in both hosts share."""

from __future__ import annotations

from typing import Any

from pal_adapters.checks import number, one_of, optional, probability
from pal_adapters.errors import ConfigError

# variant: (one coefficient per channel?, separate ones per block?, dropout)
VARIANTS: dict[str, tuple[bool, bool, float]] = {
    "scalearn": (True, True, 0.3),
    "scalearn_uniform": (False, True, 0.3),
    "scalearn_pp": (True, False, 0.3),
    "scalearn_uniform_pp": (False, False, 0.0),
}
ALIASES = {"scalearn++": "scalearn_pp", "scalearn_uniform++": "scalearn_uniform_pp"}
"""Other accepted names of variants."""


CHECKS = {
    "variant": one_of(*VARIANTS, *ALIASES),
    "omega_dropout": optional(probability()),
    "init_scale": number(-1e6),
    "init_std": number(),
    "ablation": optional(one_of("mean", "softmax")),
    "regularization": number(),
    "regularization_form": one_of("mean", "code"),
}


def check_scalearn(config: Any) -> None:
    """Check each field that ScaLearn has in both hosts."""
    for name, check in CHECKS.items():
        check(name, getattr(config, name))


def validate_scalearn(config: Any) -> None:
    """Check the fields that ScaLearn has in both hosts, and set `omega_dropout` to the variant's if it is None.

    Raises:
        ConfigError: with the field, its value and what is allowed.
    """
    check_scalearn(config)
    variant = ALIASES.get(config.variant, config.variant)
    object.__setattr__(config, "variant", variant)
    if config.omega_dropout is None:
        # The authors' runs of both ablations have no dropout.
        object.__setattr__(config, "omega_dropout", VARIANTS[variant][2] if config.ablation is None else 0.0)
    shared = not VARIANTS[variant][1]
    if config.regularization_form == "code" and (config.regularization == 0 or not shared):
        raise ConfigError(
            "regularization_form='code' has no effect here: it differs from 'mean' only for the variants that share "
            "their coefficients ('scalearn_pp', 'scalearn_uniform_pp') and with regularization > 0."
        )
