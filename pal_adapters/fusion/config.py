"""The options of ScaLearn, which its configs in both hosts share."""

from __future__ import annotations

from dataclasses import dataclass, field

from pal_adapters.checks import number, one_of, option, optional, probability
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


@dataclass(eq=False)
class ScaLearnOptions:
    r"""The options of `ScaLearnConfig` and `ScaLearnPeftConfig`.

    $$v' = v + \sum_s D(\omega_s) \odot a_s, \qquad \omega \sim N(c / S, \sigma^2)$$

    `a_s` `[b, n, d]` is what source `s` adds to a value `v`. Only `omega` and a head are trained. For S sources, L
    blocks of width d and one place in each block:

    | variant | coefficients | parameters | dropout |
    |---|---|---|---|
    | `"scalearn"` | one per channel, in each block | L S d | 0.3 |
    | `"scalearn_uniform"` | one per source, in each block | L S | 0.3 |
    | `"scalearn_pp"` | one per channel, shared by all blocks | S d | 0.3 |
    | `"scalearn_uniform_pp"` | one per source, shared by all blocks | S | 0 |

    `D` is dropout on the coefficients; each place draws its own mask at each call, also where it shares them.
    Source: Frohmann et al., ScaLearn, Findings of ACL 2024.

    Args:
        variant: one of the four; `"scalearn++"` and `"scalearn_uniform++"` also name the shared ones.
        omega_dropout: probability of dropping a coefficient; None for that of the variant, or 0 with an ablation.
        init_scale: `c`.
        init_std: `sigma`.
        ablation: `"mean"` divides `omega` by its sum over the sources, `"softmax"` takes the softmax over them.
        regularization: weight of the penalty on sources whose mean coefficient is not one, see
            `pal_adapters.fusion.layer.regularization`. It is part of the loss that the model returns in training.
        regularization_form: `"mean"`; for `"code"` see `pal_adapters.methods.released`.
    """

    variant: str = field(default="scalearn", metadata=option("One of the four sizes.", one_of(*VARIANTS, *ALIASES)))
    omega_dropout: float | None = field(
        default=None, metadata=option("Dropout on the coefficients.", optional(probability()))
    )
    init_scale: float = field(
        default=2.0, metadata=option("Sum of a channel's coefficients at the start.", number(-1e6))
    )
    init_std: float = field(default=1e-3, metadata=option("Standard deviation of the coefficients.", number()))
    ablation: str | None = field(
        default=None, metadata=option("Normalisation of the coefficients.", optional(one_of("mean", "softmax")))
    )
    regularization: float = field(default=0.0, metadata=option("Weight of the regulariser.", number()))
    regularization_form: str = field(default="mean", metadata=option("Its form.", one_of("mean", "code")))

    def complete(self) -> None:
        """Check combinations of fields, and set `omega_dropout` to the variant's if it is None.

        Raises:
            ConfigError: with the field, its value and what is allowed.
        """
        variant = ALIASES.get(self.variant, self.variant)
        object.__setattr__(self, "variant", variant)
        if self.omega_dropout is None:
            # The authors' runs of both ablations have no dropout.
            object.__setattr__(self, "omega_dropout", VARIANTS[variant][2] if self.ablation is None else 0.0)
        shared = not VARIANTS[variant][1]
        if self.regularization_form == "code" and (self.regularization == 0 or not shared):
            raise ConfigError(
                "regularization_form='code' has no effect here: it differs from 'mean' only for the variants that "
                "share their coefficients ('scalearn_pp', 'scalearn_uniform_pp') and with regularization > 0."
            )
