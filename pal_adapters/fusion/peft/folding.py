"""Folding in PEFT: a learned combination becomes one ordinary adapter, without its sources."""

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

from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.fusion.layer import SourceAttention
from pal_adapters.fusion.units import CombinedUnit, StackedSources
from pal_adapters.hosts.names import require_adapter_name
from pal_adapters.hosts.peft.change import changing

from .config import CombinationPeftConfig
from .folding_houlsby import fold_houlsby
from .folding_lora import fold_lora
from .layers import FusionBlockLayer, FusionLayer, combinations, require_combination_name

logger = logging.getLogger(__name__)
_PREFIX = "base_model.model."


def fold(
    model: PeftModel,
    adapter: str | None = None,
    name: str | None = None,
    truncate: int | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
) -> PeftModel:
    r"""The PEFT half of `pal_adapters.fold`, which has checked `truncate` and `data`.

    LoRA sources become a LoRA adapter whose rank is the sum of theirs:

    $$\sum_s \omega_s \odot (\gamma_s B_s A_s x) = [\omega_1 \odot \gamma_1 B_1, ..., \omega_S \odot \gamma_S B_S]
    \, [A_1; ...; A_S] \, x$$

    It loads in PEFT without `pal_adapters`, and `merge_and_unload()` merges it into the base weights. Houlsby
    bottlenecks with the same activation become a Houlsby adapter whose width is the sum of theirs: the coefficients
    scale `W_2` and `b_2`, and each layer norm becomes one copy, `w + sum_s omega_s (w_s - w)`. Both are exact for
    every variant and ablation.

    The returned model takes over the base model of `model` and removes the combination from it, so save `model` first.
    The head of the combination becomes the head of the new adapter. If anything fails, `model` is unchanged.

    Returns:
        A `PeftModel` with the folded adapter. Its `truncation_errors` has the error of each truncated module: the root
        mean square of the error relative to that of the adapter's output (LoRA: for N(0, 1) inputs, which is the error
        in the Frobenius norm). It is empty if nothing was truncated.
    """
    target, config = _target(model, adapter)
    name = target if name is None else name
    require_adapter_name("name", name)
    found = list(combinations(model.get_base_model(), target))
    kind = _check(model, target, found)
    if data is not None and kind == "lora":
        raise ConfigError("data has no effect on LoRA, which needs none for its best approximation: remove it.")
    head = _head(model, target)
    common = {
        "task_type": config.task_type,
        "modules_to_save": config.modules_to_save and list(config.modules_to_save),  # PEFT extends it in place
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


def check_fold(model: PeftModel, adapter: str | None = None) -> None:
    """See `pal_adapters.check_fold`."""
    target, _ = _target(model, adapter)
    found = list(combinations(model.get_base_model(), target))
    with torch.no_grad():
        if _check(model, target, found) == "lora":
            fold_lora(found, None, {})
        else:
            fold_houlsby(model, found, None, None, {})


def _replaced(model: PeftModel, folded: PeftConfig, name: str, weights: dict[str, Tensor]) -> PeftModel:
    """The base model with the folded adapter instead of the combination."""
    training = model.training
    modes = {module: module.training for module in model.get_base_model().modules()}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])  # otherwise `unload` replaces the model's own head by the trained one
    wrapped = get_peft_model(model.base_model.unload(), folded, adapter_name=name)  # type: ignore[operator]
    loaded: Any = set_peft_model_state_dict(wrapped, weights, adapter_name=name)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    wrapped.train(training)
    for module, mode in modes.items():
        module.training = mode
    return wrapped


def _target(model: Any, adapter: str | None) -> tuple[str, CombinationPeftConfig]:
    if not isinstance(model, PeftModel):
        raise UnsupportedError(f"fold takes a PeftModel, not a {type(model).__name__}.")
    require_combination_name("fusion", adapter)
    known = [name for name, config in model.peft_config.items() if isinstance(config, CombinationPeftConfig)]
    if adapter is None:
        active = [name for name in model.active_adapters if name in known]
        if len(active) != 1:
            raise UnknownAdapterError(
                f"fold needs exactly one active combination, but {active} are active: name one of {known}."
            )
        adapter = active[0]
    if adapter not in known:
        raise UnknownAdapterError(f"adapter={adapter!r} is not a combination on this model: use one of {known}.")
    config = model.peft_config[adapter]
    assert isinstance(config, CombinationPeftConfig)
    return adapter, config


def _check(model: PeftModel, target: str, found: list[tuple[str, FusionLayer, CombinedUnit]]) -> str:
    """What the combination folds to, "lora" or "houlsby"."""
    others = [name for name in model.peft_config if name != target]
    if others:
        raise UnsupportedError(
            f"the model has other adapters, {others}, and fold takes over the base model: delete them from this model "
            "(model.delete_adapter), or fold a copy.deepcopy of it."
        )
    kinds = set()
    for place, layer, unit in found:
        if any(isinstance(unit.mixer(site), SourceAttention) for site in unit.sites):
            raise UnsupportedError(
                "AdapterFusion cannot be folded: its attention over the sources depends on the input, so no fixed "
                "adapter computes the same."
            )
        if isinstance(layer, FusionBlockLayer):
            raise UnsupportedError(
                f"the sources at {place!r} are task modules such as PALs, which attend over the tokens or act beside "
                "a block: no single module of that kind computes their sum. LoRA and Houlsby sources can be folded."
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
        name
        for _, _, unit in found
        for group in unit.groups
        if isinstance(group, StackedSources)
        for name in group.activations or ()
    }
    if len(activations) > 1:
        raise UnsupportedError(
            f"the sources have the activations {sorted(activations)}, and a bottleneck has one: fold sources with the "
            "same activation."
        )
    return kinds.pop()


def _head(model: PeftModel, target: str) -> dict[str, Tensor]:
    """The trained copies of `modules_to_save`."""
    method = model.base_model.method.name  # type: ignore[union-attr]
    saved = get_peft_model_state_dict(model, adapter_name=target, save_embedding_layers=False)
    ours = tuple(f".{name}." for name in (f"{method}_units", f"{method}_shared"))
    return {key: value.clone() for key, value in saved.items() if not any(part in key for part in ours)}
