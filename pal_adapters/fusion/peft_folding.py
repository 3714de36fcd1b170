"""Folding in PEFT: a learned combination becomes one ordinary adapter, which needs neither its sources nor us."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..bottlenecks import Bottleneck
from ..errors import ConfigError, UnknownAdapterError, UnsupportedError, require_int
from ..houlsby.peft import HoulsbyPeftConfig
from ..units import UnitInputs
from .layer import Scales, SourceAttention, normalise
from .peft_config import CombinationPeftConfig
from .peft_layers import VALUE, FusionBlockLayer, FusionLayer, FusionNormLayer, combinations
from .peft_sources import innermost
from .peft_units import Combination, FixedScales, NormCopies, WideSources
from .truncation import cut_to_width, moments, noise

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
    found = list(combinations(model.get_base_model(), target))
    kind = _check(model, target, found)
    if data is not None and kind == "lora":
        raise ConfigError("data has no effect on LoRA, whose best approximation needs none: leave it out.")
    head = _head(model, target)
    with torch.no_grad():
        folded: PeftConfig
        if kind == "lora":
            folded, weights, errors = _fold_lora(config, found, truncate)
        else:
            folded, weights, errors = _fold_houlsby(model, config, found, truncate, data)
        training = model.training
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])  # else `unload` leaves the trained head in the place of the model's own
        wrapped = get_peft_model(model.base_model.unload(), folded, adapter_name=name)  # type: ignore[operator]
        loaded: Any = set_peft_model_state_dict(wrapped, {**weights, **head}, adapter_name=name)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    wrapped.train(training)
    wrapped.truncation_errors = errors  # type: ignore[assignment]
    if errors:
        worst = max(errors, key=lambda key: errors[key])
        logger.info("fold: truncated to %s; greatest relative error %.3g, at %s.", truncate, errors[worst], worst)
    return wrapped


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


def _check(model: PeftModel, target: str, found: list[tuple[str, FusionLayer, Combination]]) -> str:
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
            if isinstance(group, WideSources):
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


def _omega(unit: Combination) -> Tensor:
    """The coefficients as in inference, `[S, d]` or `[S, 1]`."""
    mixer = unit.mixer(VALUE)
    assert isinstance(mixer, (Scales, FixedScales))
    omega = mixer.omega.detach()
    return unit.select(VALUE, normalise(omega, getattr(mixer, "ablation", None)))


def _head(model: PeftModel, target: str) -> dict[str, Tensor]:
    """The trained copies of `modules_to_save`."""
    method = model.base_model.method.name  # type: ignore[union-attr]
    saved = get_peft_model_state_dict(model, adapter_name=target, save_embedding_layers=False)
    ours = tuple(f".{name}." for name in (f"{method}_units", f"{method}_shared"))
    return {key: value.clone() for key, value in saved.items() if not any(part in key for part in ours)}


def _fold_lora(
    config: CombinationPeftConfig, found: list[tuple[str, FusionLayer, Combination]], truncate: int | None
) -> tuple[LoraConfig, dict[str, Tensor], dict[str, float]]:
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    biased, transposed = {}, set()
    for place, layer, unit in found:
        group = unit.groups[0]
        assert isinstance(group, WideSources)
        up, bias = group.scaled(_omega(unit).to(group.up.device))
        down, up = group.down, up.T
        if truncate is not None and truncate < down.shape[0]:
            down, up, errors[place] = _truncated(down, up, truncate)
        ranks[place] = down.shape[0]
        key = f"{_PREFIX}{place}.lora_"
        if group.embedding:
            weights |= {f"{key}embedding_A": down, f"{key}embedding_B": up}
        else:
            weights |= {f"{key}A.weight": down, f"{key}B.weight": up}
            transposed.add(isinstance(innermost(layer._near[0]), Conv1D))
            biased[place] = torch.zeros(up.shape[0]) if bias is None else bias
    has_bias = any(bool(bias.any()) for bias in biased.values())
    if has_bias:
        if any(key.endswith("embedding_A") for key in weights):
            raise UnsupportedError(
                "sources with lora_bias=True and LoRA on embeddings: PEFT has no adapter with both."
            )
        weights |= {f"{_PREFIX}{place}.lora_B.bias": bias for place, bias in biased.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {re.escape(place): r for place, r in ranks.items() if r != rank}
    folded = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        fan_in_fan_out=transposed == {True},
        lora_bias=has_bias,
        **_common(config),
    )
    return folded, {key: value.contiguous() for key, value in weights.items()}, errors


def _common(config: PeftConfig) -> dict[str, Any]:
    return {
        "task_type": config.task_type,
        "modules_to_save": getattr(config, "modules_to_save", None),
        "inference_mode": config.inference_mode,
    }


def _truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of `up @ down` of a rank, and its relative error; never makes the product itself."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    kept_up, kept_down = (q_up @ u[:, :rank]) * root, (root.unsqueeze(1) * v[:rank]) @ q_down.T
    rest = len(root)
    error = math.sqrt(s[rest:].square().sum().item() / max(s.square().sum().item(), 1e-300))
    if rest < rank:  # the module is narrower than that
        kept_up = torch.nn.functional.pad(kept_up, (0, rank - rest))
        kept_down = torch.nn.functional.pad(kept_down, (0, 0, 0, rank - rest))
    return kept_down.to(down.dtype), kept_up.to(up.dtype), error


def _fold_houlsby(
    model: PeftModel,
    config: CombinationPeftConfig,
    found: list[tuple[str, FusionLayer, Combination]],
    truncate: int | None,
    data: Iterable[Mapping[str, Any]] | None,
) -> tuple[HoulsbyPeftConfig, dict[str, Tensor], dict[str, float]]:
    bottles: dict[str, dict[str, Tensor]] = {}
    norms: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    activation = "gelu_new"
    sums = {} if data is None else _moments_of_data(model, [unit for _, _, unit in found], data)
    for place, layer, unit in found:
        group, omega = unit.groups[0], _omega(unit)
        if isinstance(layer, FusionNormLayer):
            assert isinstance(group, NormCopies)
            own = dict(innermost(layer.base_layer).named_parameters(recurse=False))
            norms[place] = group.weights(omega, own)
            continue
        assert isinstance(group, WideSources)
        assert group.down_bias is not None
        assert group.activations is not None
        activation = group.activations[0]
        up, bias = group.scaled(omega.to(group.up.device))
        assert bias is not None
        down, down_bias, up = group.down, group.down_bias, up.T
        if truncate is not None and truncate < down.shape[0]:
            measured = sums[unit] if data is not None else moments(group.hidden(noise(down.shape[1], down)))
            (down, down_bias, up, bias), errors[place] = cut_to_width(
                Bottleneck(down, down_bias, up, bias), measured, truncate
            )
        bottles[place] = {"down.weight": down, "down.bias": down_bias, "up.weight": up, "up.bias": bias}
    width = max((b["down.bias"].shape[0] for b in bottles.values()), default=1)
    weights: dict[str, Tensor] = {}
    for place, bottle in bottles.items():
        for key, value in _padded(bottle, width).items():
            weights[f"{_PREFIX}{place}.houlsby.houlsby_units.{key}"] = value
    for place, norm in norms.items():  # a norm that no source has a copy of becomes a copy of the base model's
        for key, value in norm.items():
            weights[f"{_PREFIX}{place}.houlsby_norms.{key}"] = value
    folded = HoulsbyPeftConfig(
        hidden_size=width,
        activation=activation,
        target_modules=list(bottles),
        train_layernorm=bool(norms),
        **_common(config),
    )
    return folded, {key: value.detach().clone().contiguous() for key, value in weights.items()}, errors


def _moments_of_data(
    model: PeftModel, units: Iterable[Combination], data: Iterable[Mapping[str, Any]]
) -> dict[Combination, Tensor]:
    """What the hidden values of the sources at each place are like."""
    sums: dict[Combination, Tensor] = {}
    keep: list[Tensor | None] = [None]

    def hook(unit: Combination, args: tuple[str, Tensor, UnitInputs, Any]) -> None:
        value, group = args[1], unit.groups[0]
        assert isinstance(group, WideSources)
        hidden, mask = group.hidden(value), keep[0]
        if mask is not None and mask.shape == hidden.shape[:2]:
            hidden = hidden[mask]
        sums[unit] = sums.get(unit, 0) + moments(hidden.flatten(0, -2))

    modes = {module: module.training for module in model.modules()}
    handles = [u.register_forward_pre_hook(hook) for u in units if isinstance(u.groups[0], WideSources)]
    try:
        model.eval()
        for batch in data:
            mask = batch.get("attention_mask")
            keep[0] = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not sums:
        raise ConfigError("data=[] is not allowed: pass at least one batch of model inputs, or None.")
    return sums


def _padded(bottle: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """With units that give nothing, where fewer sources adapt a module: an adapter has one width."""
    missing = width - bottle["down.bias"].shape[0]
    pad = torch.nn.functional.pad
    return {
        "down.weight": pad(bottle["down.weight"], (0, 0, 0, missing)),
        "down.bias": pad(bottle["down.bias"], (0, missing)),
        "up.weight": pad(bottle["up.weight"], (0, missing)),
        "up.bias": bottle["up.bias"],
    }
