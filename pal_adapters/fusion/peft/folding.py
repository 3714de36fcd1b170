"""Folding in PEFT: a learned combination becomes one ordinary adapter, which needs neither its sources nor us."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from pal_adapters.checks import require_int
from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.fusion.layer import SourceAttention
from pal_adapters.fusion.units import CombinedUnit, StackedSources
from pal_adapters.hosts.peft.change import changing, check_adapter_name

from .config import CombinationPeftConfig
from .folding_houlsby import fold_houlsby
from .folding_lora import fold_lora
from .layers import FusionBlockLayer, FusionLayer, combinations

logger = logging.getLogger(__name__)
_PREFIX = "base_model.model."


def fold(
    model: PeftModel,
    adapter: str | None = None,
    *,
    name: str | None = None,
    truncate: int | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
) -> PeftModel:
    r"""One ordinary adapter that computes what a combination of sources does.

    LoRA sources give a LoRA adapter, of the sum of their ranks:

    $$\sum_s \omega_s \odot (\gamma_s B_s A_s x) = [\omega_1 \odot \gamma_1 B_1, ..., \omega_S \odot \gamma_S B_S]
    \, [A_1; ...; A_S] \, x$$

    It loads in PEFT without `pal_adapters`, and `merge_and_unload()` brings it into the base weights. Houlsby
    bottlenecks of one activation give a Houlsby adapter, of the sum of their widths: the coefficients go into `W_2`
    and `b_2`, the layer norms become one copy each, `w + sum_s omega_s (w_s - w)`. Both are exact for every variant,
    with the ablations too. Biases of the sources are weighed as their outputs are.

    The base model inside `model` is taken over: the combination is taken off it, and what is returned holds it. Save
    `model` before. The head of the target becomes the head of the new adapter.

    Args:
        model: a model with a ScaLearn or fixed combination.
        adapter: the target; the active one by default.
        name: of the new adapter; `adapter` by default.
        truncate: greatest rank, or width of a bottleneck. LoRA: the best approximation of that rank, by singular
            values. Houlsby: the units that matter most, found by a singular value decomposition of what they
            contribute, and `W_2` fitted anew, see `pal_adapters.fusion.truncation.cut_to_width`.
        data: with `truncate`, for Houlsby: batches (mappings of model inputs) whose tokens are weighed; without them,
            the inputs of a bottleneck are taken as N(0, 1).

    Returns:
        A `PeftModel` with the folded adapter. `truncation_errors` on it names for each module what `truncate` has
        cost: the root mean square of the error over that of what the adapter adds (LoRA: for N(0, 1) inputs, the
        error in the Frobenius norm). It is empty where nothing was cut.

    Raises:
        UnknownAdapterError: if there is no such target.
        UnsupportedError: where no exact fold exists, with the reason. Nothing has changed then.
        ConfigError: for a value of `truncate` that is not allowed, or `data` that are empty or have no effect.
    """
    target, config = _target(model, adapter)
    if truncate is not None:
        require_int("truncate", truncate, minimum=1)
    elif data is not None:
        raise ConfigError("data has no effect without truncate: leave it out.")
    name = target if name is None else name
    check_adapter_name(name)
    found = list(combinations(model.get_base_model(), target))
    kind = _check(model, target, found)
    if data is not None and kind == "lora":
        raise ConfigError("data has no effect on LoRA, whose best approximation needs none: leave it out.")
    head = _head(model, target)
    common = {
        "task_type": config.task_type,
        "modules_to_save": config.modules_to_save,
        "inference_mode": config.inference_mode,
    }
    folded: PeftConfig
    with torch.no_grad():
        if kind == "lora":
            folded, weights, errors = fold_lora(found, truncate, common)
        else:
            folded, weights, errors = fold_houlsby(model, found, truncate, data, common)
        with changing(model):
            wrapped = _replaced(model, folded, name, {**weights, **head})
    wrapped.truncation_errors = errors  # type: ignore[assignment]
    if errors:
        worst = max(errors, key=lambda key: errors[key])
        logger.info("fold: truncated to %s; largest relative error %.3g, at %s.", truncate, errors[worst], worst)
    return wrapped


def _replaced(model: PeftModel, folded: PeftConfig, name: str, weights: dict[str, Tensor]) -> PeftModel:
    """The base model with the folded adapter in the place of the combination."""
    training = model.training
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])  # else `unload` leaves the trained head in the place of the model's own
    wrapped = get_peft_model(model.base_model.unload(), folded, adapter_name=name)  # type: ignore[operator]
    loaded: Any = set_peft_model_state_dict(wrapped, weights, adapter_name=name)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    return wrapped.train(training)


def _target(model: Any, adapter: str | None) -> tuple[str, CombinationPeftConfig]:
    if not isinstance(model, PeftModel):
        raise UnsupportedError(f"fold takes a PeftModel, not a {type(model).__name__}.")
    known = [name for name, config in model.peft_config.items() if isinstance(config, CombinationPeftConfig)]
    if adapter is None:
        active = [name for name in model.active_adapters if name in known]
        if len(active) != 1:
            raise UnknownAdapterError(
                f"fold needs one active combination, but {active} are: pass adapter=, of {known}."
            )
        adapter = active[0]
    if adapter not in known:
        raise UnknownAdapterError(f"adapter={adapter!r} is no combination on this model: use one of {known}.")
    config = model.peft_config[adapter]
    assert isinstance(config, CombinationPeftConfig)
    return adapter, config


def _check(model: PeftModel, target: str, found: list[tuple[str, FusionLayer, CombinedUnit]]) -> str:
    """What it can be folded to, "lora" or "houlsby"."""
    others = [name for name in model.peft_config if name != target]
    if others:
        raise UnsupportedError(
            f"the model has other adapters, {others}, and fold takes the base model over: delete them from this model "
            "(model.delete_adapter), or fold a copy.deepcopy of it."
        )
    kinds = set()
    for place, layer, unit in found:
        if any(isinstance(unit.mixer(site), SourceAttention) for site in unit.sites):
            raise UnsupportedError(
                "AdapterFusion cannot be folded: how it weighs its sources depends on the input, so no fixed adapter "
                "computes the same."
            )
        if isinstance(layer, FusionBlockLayer):
            raise UnsupportedError(
                f"the sources at {place!r} are task modules such as PALs, which attend over the tokens or act beside "
                "a block: no single module of their kind computes their sum. LoRA and Houlsby sources can be folded."
            )
        for group in unit.groups:
            if isinstance(group, StackedSources):
                kinds.add("lora" if group.activations is None else "houlsby")
            else:
                kinds.add("houlsby")
    if len(kinds) > 1:
        raise UnsupportedError(
            "the sources are LoRA adapters and Houlsby bottlenecks, and no single adapter has both: fold combinations "
            "of one kind."
        )
    activations = {
        name for _, _, unit in found for group in unit.groups for name in getattr(group, "activations", None) or ()
    }
    if len(activations) > 1:
        raise UnsupportedError(
            f"the sources have the activations {sorted(activations)}, and one bottleneck has one: fold sources with "
            "one activation."
        )
    return kinds.pop()


def _head(model: PeftModel, target: str) -> dict[str, Tensor]:
    """The trained copies of `modules_to_save`."""
    method = model.base_model.method.name  # type: ignore[union-attr]
    saved = get_peft_model_state_dict(model, adapter_name=target, save_embedding_layers=False)
    ours = tuple(f".{name}." for name in (f"{method}_units", f"{method}_shared"))
    return {key: value.clone() for key, value in saved.items() if not any(part in key for part in ours)}
