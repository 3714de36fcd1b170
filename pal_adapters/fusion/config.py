"""The four sizes of ScaLearn, and the checks that its configs in both hosts share."""

from __future__ import annotations

from typing import Any

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


def variant_of(name: Any) -> str:
    """The variant with a name.

    Raises:
        ConfigError: if the name is unknown.
    """
    name = ALIASES.get(name, name)
    if name not in VARIANTS:
        raise ConfigError(f"variant={name!r} is not allowed: use one of {[*VARIANTS, *ALIASES]}.")
    return str(name)


def validate_scalearn(config: Any) -> None:
    """Check the fields that ScaLearn has in both hosts, and set `omega_dropout` to the variant's if it is None.

    Raises:
        ConfigError: with the field, its value and what is allowed.
    """
    variant = variant_of(config.variant)
    object.__setattr__(config, "variant", variant)
    if config.omega_dropout is None:
        # The authors' runs of both ablations have no dropout.
        object.__setattr__(config, "omega_dropout", VARIANTS[variant][2] if config.ablation is None else 0.0)
    if not 0 <= config.omega_dropout < 1:
        raise ConfigError(f"omega_dropout={config.omega_dropout!r} is not allowed: use a number in [0, 1).")
    if config.init_std < 0:
        raise ConfigError(f"init_std={config.init_std!r} is not allowed: use a number >= 0.")
    shared = not VARIANTS[variant][1]
    if config.ablation not in (None, "mean", "softmax"):
        raise ConfigError(f"ablation={config.ablation!r} is not allowed: use None, 'mean' or 'softmax'.")
    if config.regularization < 0:
        raise ConfigError(f"regularization={config.regularization!r} is not allowed: use a weight >= 0.")
    if config.regularization_form not in ("mean", "code"):
        raise ConfigError(
            f"regularization_form={config.regularization_form!r} is not allowed: use 'mean', or 'code' for what the "
            "released code of ScaLearn computes."
        )
    if config.regularization_form == "code" and (config.regularization == 0 or not shared):
        raise ConfigError(
            "regularization_form='code' has no effect here: it differs from 'mean' only for the variants that share "
            "their coefficients ('scalearn_pp', 'scalearn_uniform_pp') and with regularization > 0."
        )
