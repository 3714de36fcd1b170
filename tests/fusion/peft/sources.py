"""Saved source adapters, and what their combination computes, in plain torch from the saved files."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import pal_adapters as pa
from pal_adapters.fusion.peft.tuner import combinations
from pal_adapters.fusion.units import CombinedUnit
from tests import plain
from tests.hosts.peft import cases, reference
from tests.record import Values

# Ranks, scalings and modules all differ, and each adapts a module that the other does not.
LORA: dict[str, dict[str, Any]] = {
    "mnli": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
    "qqp": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["query", "output.dense"],
            "rank_pattern": {"query": 3}, "alpha_pattern": {"query": 5}},
    "rte": {"r": 3, "lora_alpha": 3, "target_modules": r".*layer\.1\.attention\.self\.(query|key)", "lora_bias": True,
            "lora_dropout": 0.5},
}  # fmt: skip
HOULSBY: dict[str, dict[str, Any]] = {
    "mnli": {"hidden_size": 4},
    "qqp": {"hidden_size": 7, "train_layernorm": False},
    "rte": {"hidden_size": 3, "target_modules": ["encoder.layer.1"]},
}
PALS: dict[str, dict[str, Any]] = {
    "mnli": {"hidden_size": 12, "num_heads": 3},
    "qqp": {"hidden_size": 18, "num_heads": 3, "dropout": 0.5},
    "rte": {"hidden_size": 6, "num_heads": 3},
}
KINDS = {"lora": (LoraConfig, LORA), "houlsby": (pa.HoulsbyPeftConfig, HOULSBY), "pal": (pa.PALPeftConfig, PALS)}


def randomise(model: nn.Module, *, seed: int, scale: float = 0.3) -> None:
    """Move every parameter of the adapters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def save(
    folder: pathlib.Path, config: Any, *, seed: int, build: Callable[[], Any] = cases.bert, name: str | None = None
) -> str:
    """Save one source."""
    base = build()
    if name is not None:
        base.name_or_path = name
    model = get_peft_model(base, config)
    randomise(model, seed=seed)
    model.save_pretrained(str(folder))
    return str(folder)


def save_all(folder: pathlib.Path, kind: str) -> dict[str, str]:
    """Save the three sources of a kind."""
    config_class, settings = KINDS[kind]
    return {
        name: save(folder / kind / name, config_class(task_type="SEQ_CLS", **arguments), seed=seed)
        for seed, (name, arguments) in enumerate(settings.items())
    }


def tensors(path: str) -> dict[str, Tensor]:
    saved = load_file(pathlib.Path(path) / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in saved.items()}


def scaling(path: str, module: str, rank: int) -> float:
    """Of LoRA, from the saved config."""
    config = json.loads((pathlib.Path(path) / "adapter_config.json").read_text())
    alpha = next((a for key, a in config["alpha_pattern"].items() if module.endswith(key)), config["lora_alpha"])
    return alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


Omega = Callable[[str, str], Any]


def combined_logits(
    model: Any,
    paths: Mapping[str, str],
    omega: Omega,
    given: Mapping[str, Tensor],
    head: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The logits of a plain `BertForSequenceClassification` with `v + sum_s omega_s a_s` at every place.

    Args:
        omega: the coefficient of a source at a place, by the name of the module or block, and of the source.
        head: the trained classifier.
    """
    if head is not None:
        model.classifier.load_state_dict(head)
    modules = dict(model.named_modules())
    mask = given["attention_mask"]
    keep = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
    norms: dict[str, dict[str, Tensor]] = {}
    terms: dict[str, list[Callable[[Tensor, Tensor], Tensor]]] = {}
    for source, path in paths.items():
        saved = tensors(path)
        for key, down in saved.items():
            place = key.partition(".lora_A")[0].partition(".houlsby")[0]
            if key.endswith(".lora_A.weight"):
                up = saved[f"{place}.lora_B.weight"]
                more = saved.get(f"{place}.lora_B.bias", torch.zeros(()))
                factor = scaling(path, place, down.shape[0]) * omega(place, source)
                terms.setdefault(place, []).append(
                    lambda x, y, a=down, b=up, c=more, f=factor: f * (x @ a.T @ b.T + c)
                )
            elif key.endswith("down.weight"):
                w = plain.under(saved, f"{place}.houlsby.houlsby_units.")
                factor = omega(place, source)
                terms.setdefault(place, []).append(lambda x, y, w=w, f=factor: f * (plain.houlsby(y, w) - y))
            elif ".houlsby_norms." in key:
                own = norms.setdefault(place, {n: p.detach().clone() for n, p in modules[place].named_parameters()})
                part = key.rpartition(".")[2]
                own[part] = own[part] + omega(place, source) * (down - modules[place].get_parameter(part).detach())
        if any(".pal_units." in key for key in saved):
            method = reference.Adapter("pal", saved, "bert.encoder.layer", {})
            for index, layer in enumerate(model.bert.encoder.layer):
                place = f"bert.encoder.layer.{index}"
                kept: list[Tensor] = []
                factor, own = omega(place, source), method.block(index)
                layer.register_forward_pre_hook(
                    lambda m, args, kwargs, kept=kept: kept.__setitem__(slice(None), [args[0]]), with_kwargs=True
                )
                layer.output.dropout.register_forward_hook(
                    lambda m, a, out, k=kept, w=own, s=method.reference, o=factor: (
                        out + o * s.term(w, Values(k[0], k[0], k[0], keep, post=True))
                    )
                )
    for place, added in terms.items():
        modules[place].register_forward_hook(
            lambda m, args, out, added=added: out + sum(term(args[0], out) for term in added)
        )
    for place, weights in norms.items():
        modules[place].register_forward_hook(
            lambda m, args, out, w=weights: F.layer_norm(args[0], (24,), w["weight"], w["bias"], m.eps)
        )
    with torch.no_grad():
        return model(**given).logits


def units(model: nn.Module, adapter: str | None = None) -> dict[str, CombinedUnit]:
    """The combinations of a target by place, without the prefix of `PeftModel`."""
    return {p.removeprefix("base_model.model."): u for p, _, u in combinations(model, adapter)}


def learned(model: nn.Module, adapter: str | None = None, ablation: str | None = None) -> Omega:
    """The coefficients of a target as `combined_logits` takes them."""
    found = {}
    for place, unit in units(model, adapter).items():
        (site,) = unit.sites
        omega = unit.mixer(site).omega.detach().clone()
        if ablation == "mean":
            omega = omega / omega.sum(0)
        if ablation == "softmax":
            omega = omega.exp() / omega.exp().sum(0)
        omega = unit.select(site, omega)
        found |= {(place, source): omega[row] for row, source in enumerate(unit.names[site])}
    return lambda place, source: found[place, source]


def set_all(model: nn.Module, values: Mapping[str, float], adapter: str | None = None) -> None:
    """Give each source one coefficient everywhere, 0 where it is not named."""
    with torch.no_grad():
        for unit in units(model, adapter).values():
            for site in unit.sites:
                omega = unit.mixer(site).omega
                names = unit.names[site]
                rows = unit._rows[site] or range(len(names))
                for row, source in zip(rows, names, strict=True):
                    omega[row] = values.get(source, 0.0)


def head_of(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """The trained classifier of a target."""
    return model.base_model.model.classifier.modules_to_save[adapter].state_dict()
