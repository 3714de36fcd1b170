"""The penalties of fusions on their coefficients, the same for both hosts."""

from __future__ import annotations

from torch import Tensor, nn

from .arguments import require_host


def fusion_regularization(model: nn.Module) -> Tensor:
    """The penalty of the active fusion on its coefficients, a float32 scalar; 0 if its weight is 0, or none is active.

    An `AdapterSetup` makes a fusion active inside its `with` block and thread only: call this function in there.

    In training, models add it to the loss they return. Call this function only in a training loop that computes its
    own loss from the logits.

    Args:
        model: a model of `adapters` with an active `Fuse`, or a `PeftModel` with an active combination.

    Raises:
        UnsupportedError: if the model has no adapters.
    """
    penalty: Tensor | None
    if require_host(model) == "peft":
        from pal_adapters.fusion.peft.penalty import regularization_loss  # the host may be missing

        penalty = regularization_loss(model)
    else:
        from pal_adapters.hosts.adapters.penalty import active_penalty  # the host may be missing

        penalty = active_penalty(model)
    return next(model.parameters()).new_zeros(()).float() if penalty is None else penalty


def penalty_of(model: nn.Module, name: str) -> Tensor | None:
    """The penalty of one fusion of `adapters` or one combination of PEFT; None if nothing is penalised.

    Args:
        model: a model of `adapters`, or a `PeftModel`.
        name: of the fusion, or of the PEFT adapter that is a combination.
    """
    if require_host(model) == "peft":
        from pal_adapters.fusion.peft.penalty import regularization_loss  # the host may be missing

        penalty: Tensor | None = regularization_loss(model, name)
        return penalty if penalty is not None and penalty.requires_grad else None
    from pal_adapters.hosts.adapters.penalty import penalty_of as penalty_in_adapters  # the host may be missing

    return penalty_in_adapters(model, name)
