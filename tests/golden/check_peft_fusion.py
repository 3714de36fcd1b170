"""The golden cases of ScaLearn in PEFT.

A source in PEFT adds to what a module returns, so the cases over bottlenecks behind both branches (`double_seq_bn`,
"houlsby" in the reference) can be expressed, with `HoulsbyPeftConfig(activation="silu", train_layernorm=False)`. The
others, and both of AdapterFusion, have the "pfeiffer" bottleneck, which reads the block's last norm and is added in
front of the same norm: no module of the block returns the value that it changes, so no adapter in PEFT does that.
"""

from __future__ import annotations

import pathlib
import re
import types
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import pal_adapters
from pal_adapters.fusion import layer as fusion_layer
from pal_adapters.fusion.peft.tuner import combinations

CASES = {
    "scalearn_encoder_houlsby_vector": "scalearn",
    "scalearn_encoder_houlsby_plusplus_vector": "scalearn_pp",
    "scalearn_encoder_train_plusplus": "scalearn_pp",
}
SINGLE = "adapters_houlsby"
_PLACES = {"mh_adapter": "attention.output.dropout", "output_adapter": "output.dropout"}


def _save_sources(case: Any, base: Any, folder: pathlib.Path) -> dict[str, str]:
    weights = load_file(case.directory / "adapters_houlsby.safetensors")
    paths = {}
    for name in case.meta["hyperparameters"]["adapter_names"]:
        config = pal_adapters.HoulsbyPeftConfig(
            hidden_size=case.meta["hyperparameters"]["bottleneck"], activation="silu", train_layernorm=False
        )
        model = get_peft_model(base, config, adapter_name=f"source_{name}")
        placed = 0
        for key, parameter in model.named_parameters():
            match = re.search(r"(encoder\.layer\.\d+\..*output)\.dropout\.houlsby\..*\.(down|up)\.(\w+)$", key)
            if match is not None:
                part = {"down": "adapter_down.0", "up": "adapter_up"}[match[2]]
                parameter.data.copy_(weights[f"{match[1]}.adapters.{name}.{part}.{match[3]}"])
                placed += 1
        if placed != 2 * 4 * len(base.encoder.layer):
            raise RuntimeError(f"{case.name}: {placed} weights of source {name} found their place")
        model.save_pretrained(str(folder))
        paths[name] = str(folder / f"source_{name}")
        base = model.unload()
    return paths


def compare(case: Any, folder: pathlib.Path) -> tuple[float, float] | None:
    """Maximal differences of outputs and gradients, or None where PEFT cannot express the case.

    Args:
        case: a `check.Case`.
        folder: where the sources are saved.
    """
    if case.name == SINGLE:
        return _compare_singles(case, folder)
    variant = CASES.get(case.name)
    if variant is None:
        return None
    base, tensors = case.bert(), case.tensors
    paths = _save_sources(case, base, folder)
    config = pal_adapters.ScaLearnPeftConfig(adapters=paths, variant=variant)
    tuned = get_peft_model(base, config)
    omegas: dict[str, torch.Tensor] = {}
    for place, _, unit in combinations(base):
        number, part = re.search(r"encoder\.layer\.(\d+)\.(.*)", place).groups()  # type: ignore[union-attr]
        golden = next(name for name, path in _PLACES.items() if path == part)
        name = "shared" if variant == "scalearn_pp" else f"layer{number}.{golden}"
        omega = unit.mixer("value").omega
        omega.data.copy_(tensors[f"scalearn.{name}.omega"])
        omegas[f"grad.scalearn.{name}.omega"] = omega
    masks = [tensors.get(f"keep_mask.layer{i}.{name}") for i in range(len(base.encoder.layer)) for name in _PLACES]
    drawn = iter(masks)

    def dropout(omega: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        mask = next(drawn)
        return omega if not training or mask is None else omega * mask / (1 - p)

    tuned.eval()
    if masks[0] is not None:  # the case is one of training, with the dropout of BERT off
        tuned.train()
        for module in tuned.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_(True))
        return kept[0]

    handle = base.embeddings.register_forward_hook(keep)
    names = ("input_ids", "attention_mask", "token_type_ids")
    with mock.patch.object(fusion_layer, "F", types.SimpleNamespace(dropout=dropout)):
        result = base(**{name: tensors[name] for name in names}, output_hidden_states=True)
    handle.remove()
    loss = (tensors["loss_weight.last_hidden_state"] * result.last_hidden_state).sum()
    loss = loss + (tensors["loss_weight.pooler_output"] * result.pooler_output).sum()
    loss.backward()
    computed = {f"layer_output.{i}": hidden for i, hidden in enumerate(result.hidden_states[1:])}
    computed["pooler_output"] = result.pooler_output
    outputs = max(_difference(tensors[n], v.detach()) for n, v in computed.items() if n in tensors)
    outputs = max(outputs, _difference(tensors["loss"], loss.detach()) / max(1.0, tensors["loss"].abs().item()))
    grads = {"grad.embedding_output": kept[0].grad} | {name: omega.grad for name, omega in omegas.items()}
    missing = [name for name in tensors if name.startswith("grad.") and name not in grads]
    if missing:
        raise RuntimeError(f"{case.name}: no counterpart for {missing[0]}")
    return outputs, max(_difference(tensors[name], grad) for name, grad in grads.items())


def _compare_singles(case: Any, folder: pathlib.Path) -> tuple[float, float]:
    """Each source alone, and a combination with its coefficient 1 and the others 0."""
    paths, worst = _save_sources(case, case.bert(), folder), 0.0
    inputs = {name: case.tensors[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    for name, path in paths.items():
        coefficients = {other: float(other == name) for other in paths}
        config = pal_adapters.FixedCombinationPeftConfig(adapters=paths, coefficients=coefficients)
        for model in (PeftModel.from_pretrained(case.bert(), path), get_peft_model(case.bert(), config)):
            with torch.no_grad():
                result = model.eval()(**inputs)
            for part in ("last_hidden_state", "pooler_output"):
                worst = max(worst, _difference(case.tensors[f"single.{name}.{part}"], result[part]))
    return worst, 0.0


def _difference(a: torch.Tensor, b: torch.Tensor | None) -> float:
    assert b is not None
    return (a - b.reshape(a.shape)).abs().max().item()
