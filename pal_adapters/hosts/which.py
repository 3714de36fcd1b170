"""Which host a model belongs to, and the functions that ask each host for the same thing."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from pal_adapters.errors import UnsupportedError


def host_of(model: Any) -> Literal["adapters", "peft"]:
    """The library that adapted a model.

    Raises:
        UnsupportedError: for a model without adapters of either.
    """
    if hasattr(model, "adapters_config"):
        return "adapters"
    if hasattr(model, "peft_config"):  # a PeftModel, or a model of transformers with its own `add_adapter`
        return "peft"
    raise UnsupportedError(
        f"{type(model).__name__} has no adapters: pass a model after adapters.init(model) or get_peft_model(...)."
    )


def fusion_regularization(model: nn.Module) -> Tensor:
    """The penalty of the active fusion on its coefficients, a scalar in float32; 0 where its weight is 0.

    Models add it to the loss that they return in training. For a training loop that computes its own loss from logits.

    Args:
        model: a model of `adapters` with an active `Fuse`, or a `PeftModel` with an active combination.

    Raises:
        UnsupportedError: for a model without adapters.
    """
    if host_of(model) == "peft":
        from pal_adapters.fusion.peft.penalty import regularization_loss

        penalty: Tensor | None = regularization_loss(model)
    else:
        from pal_adapters.hosts.adapters.penalty import active_penalty

        penalty = active_penalty(model)
    return next(model.parameters()).new_zeros(()).float() if penalty is None else penalty


def penalty_of(model: nn.Module, name: str) -> Tensor | None:
    """The penalty of one fusion of `adapters`, or of one combination of PEFT; None where nothing is penalised.

    Args:
        model: a model of `adapters`, or a `PeftModel`.
        name: of the fusion, or of the adapter that is a combination.
    """
    if host_of(model) == "peft":
        from pal_adapters.fusion.peft.penalty import regularization_loss

        penalty: Tensor | None = regularization_loss(model, name)
        return penalty if penalty is not None and penalty.requires_grad else None
    from pal_adapters.hosts.adapters.penalty import penalty_of as penalty_in_adapters

    return penalty_in_adapters(model, name)
