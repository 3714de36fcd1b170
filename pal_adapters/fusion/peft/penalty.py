"""The regularisers of combinations in PEFT, and the hook that adds them to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.fusion.layer import Scales, SourceAttention, regularization
from pal_adapters.hooks.penalty import add_to_loss, is_by_caller

from .layers import combinations


def regularization_loss(model: nn.Module, adapter: str | None = None) -> Tensor | None:
    """The regulariser of one combination or of the active ones; None if there is none.

    In training, the loss that the model returns already contains it. Add it only to a loss that you compute yourself.

    Args:
        model: a `PeftModel` or its base model.
        adapter: name of the combination; the active ones by default.
    """
    scales: dict[tuple[float, Any], dict[int, Tensor]] = {}
    terms = []
    for _, _, unit in combinations(model, adapter):
        weight, form = unit.regularization
        for site in unit.sites if weight else ():
            mixer = unit.mixer(site)
            if isinstance(mixer, SourceAttention):
                terms.append(mixer.regularization(weight))
            elif isinstance(mixer, Scales):
                scales.setdefault((weight, form), {})[id(mixer)] = mixer.omega
    terms += [regularization(list(omegas.values()), weight, form) for (weight, form), omegas in scales.items()]
    return None if not terms else torch.stack([term.to(terms[0].device) for term in terms]).sum()


def add_regularization(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the base model: adds the regulariser to the loss in training."""
    if not module.training or not torch.is_grad_enabled() or is_by_caller():
        return None
    term = regularization_loss(module)
    return None if term is None or not term.requires_grad else add_to_loss(output, kwargs, term)
