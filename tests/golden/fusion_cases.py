"""The cases of ScaLearn and AdapterFusion; `check.py` runs them."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import pal_adapters
from pal_adapters.fusion.layer import Scales, combine, regularization

REPOSITORY = "CPJKU/ScaLearn"
Tensors = dict[str, torch.Tensor]
Difference = Callable[[torch.Tensor, torch.Tensor], float]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b.reshape(a.shape)).abs().max().item()


@contextmanager
def keep_masks(masks: list[torch.Tensor]) -> Iterator[None]:
    """Dropout that keeps what each mask says, in the order of the calls; other calls must not drop anything."""
    left, original = list(masks), nn.functional.dropout

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return x
        mask = left.pop(0)
        assert mask.shape == x.shape
        return x * mask / (1 - p)

    nn.functional.dropout = dropout
    try:
        yield
        assert not left, f"{len(left)} masks were not used"
    finally:
        nn.functional.dropout = original


def compare_module(case: Any) -> tuple[float, float]:
    """`Scales` and `combine` by themselves, for each variant that the module file has."""
    t = case.tensors
    outputs = gradients = 0.0
    for name, flags in case.meta["hyperparameters"]["variants"].items():
        omega = t[f"{name}.omega"]
        ablation = "mean" if flags["take_mean"] else "softmax" if flags["take_softmax"] else None
        scales = Scales(*omega.shape, dropout=flags["dropout_ratio"], ablation=ablation)  # type: ignore[arg-type]
        scales.omega.data.copy_(omega)
        for part in ("", "train."):
            if f"{name}.{part}output" not in t:
                continue
            scales.zero_grad()
            scales.train(part == "train.")
            up = t["up_list"].clone().requires_grad_(True)
            with keep_masks([t[f"{name}.train.keep_mask"]] if part else []):
                output = combine(scales(), up)
            if flags["residual"]:
                output = output + t["residual"]
            (output * t["g"]).sum().backward()
            outputs = max(outputs, difference(t[f"{name}.{part}output"], output.detach()))
            for grad, value in (("omega", scales.omega.grad), ("up_list", up.grad)):
                if f"{name}.{part}grad.{grad}" in t:
                    gradients = max(gradients, difference(t[f"{name}.{part}grad.{grad}"], value))
    return outputs, gradients


def compare_sampling(case: Any) -> tuple[float, float]:
    """A temperature is the exponent 1/T of `task_probabilities`."""
    from pal_adapters.multitask import task_probabilities

    worst = 0.0
    for row in case.meta["results"].values():
        for temperature, result in row["temperatures"].items():
            computed = torch.from_numpy(task_probabilities(row["dataset_sizes"], 1 / float(temperature)))
            worst = max(worst, difference(torch.tensor(result["weights"], dtype=torch.float64), computed))
    return worst, 0.0


def regularize(case: Any) -> tuple[float, float] | None:
    """The penalty in plain torch, and the gradient; None where the case has none."""
    if "regularization_loss" not in case.tensors or "scalearn" not in case.meta["hyperparameters"]:
        return None
    settings = case.meta["hyperparameters"]["scalearn"]
    omegas = {k: v.clone().requires_grad_(True) for k, v in case.tensors.items() if k.startswith("scalearn.")}
    form = "code" if settings["per_layer_shared"] else "mean"
    value = regularization(list(omegas.values()), settings["lambda_reg"], form)  # type: ignore[arg-type]
    value.backward()
    stored = case.tensors["regularization_loss"]
    grads = [difference(case.tensors[f"regularization_grad.{k}"], v.grad) for k, v in omegas.items()]
    return difference(stored, value.detach()) / max(1.0, stored.abs().max().item()), max(grads)


# In adapters


def config_of(case: Any) -> Any:
    """The fusion config that a case asks for."""
    values = case.meta["hyperparameters"]
    if "fusion_config" in values:
        return values["fusion_config"]
    flags = values["scalearn"]
    variant = "scalearn" if flags["omega_shape"] == "vector" else "scalearn_uniform"
    variant += "_pp" if flags["per_layer_shared"] else ""
    penalty = {}
    if flags["regularization"]:
        penalty = {"regularization": flags["lambda_reg"]}
        if flags["per_layer_shared"]:
            penalty["regularization_form"] = "code"
    return pal_adapters.ScaLearnConfig(
        variant=variant,
        omega_dropout=flags["dropout_ratio"],
        ablation="mean" if flags["take_mean"] else "softmax" if flags["take_softmax"] else None,
        **penalty,
    )


def compare_adapters(case: Any) -> tuple[float, float]:
    import adapters
    from adapters.composition import Fuse, Stack

    values = case.meta["hyperparameters"]
    names = values["adapter_names"]
    model = case.bert()
    for part in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(model.config, part, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    adapters.init(model)
    kind = "double_seq_bn" if "DoubleSeqBn" in values["adapter_config_in_adapters_1.x"] else "seq_bn"
    for name in names:
        model.add_adapter(name, config=adapters.AdapterConfig.load(kind, reduction_factor=values["reduction_factor"]))
    file = case.meta.get("adapter_weights", f"{case.name}.safetensors")
    weights = {k: v for k, v in load_file(case.directory / file).items() if ".adapters." in k}
    place(model, weights)
    if case.name.startswith("adapters_"):
        return compare_singles(model, case, names)
    model.add_adapter_fusion(Fuse(*names), config=config_of(case))
    setup = Stack(Fuse(*names))
    model.train_adapter_fusion(setup)
    fusion = ",".join(names)
    omegas = golden_names(model, case, fusion)
    for key, parameter in omegas.items():
        parameter.data.copy_(case.tensors[key])
    masks = [v for k, v in case.tensors.items() if k.startswith("keep_mask.")]  # in the order of the calls
    model.train(bool(masks))
    with keep_masks(masks):
        outputs, start = forward_and_back(model, case)
    gradients = difference(case.tensors["grad.embedding_output"], start)
    for key, parameter in omegas.items():
        if f"grad.{key}" in case.tensors:
            gradients = max(gradients, difference(case.tensors[f"grad.{key}"], parameter.grad))
    if "regularization_loss" in case.tensors:
        model.zero_grad()
        if "fusion_config" in values:
            penalty = model.get_fusion_regularization_loss()
        else:
            penalty = pal_adapters.fusion_regularization(model)
            penalty.backward()
            for key, parameter in omegas.items():
                gradients = max(gradients, difference(case.tensors[f"regularization_grad.{key}"], parameter.grad))
        stored = case.tensors["regularization_loss"]
        outputs = max(outputs, difference(stored, penalty.detach()) / max(1.0, stored.abs().max().item()))
    return outputs, gradients


def place(model: nn.Module, weights: Tensors) -> None:
    """Copy tensors into a model that has all of them."""
    _missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected[0]


def golden_names(model: Any, case: Any, fusion: str) -> dict[str, nn.Parameter]:
    """The golden names of a fusion's weights, with the model's parameters; each must have its partner."""
    found = {}
    for name, parameter in model.named_parameters():
        if f"adapter_fusion_layer.{fusion}." not in name:
            continue
        key = name
        if "scalearn" in case.meta["hyperparameters"]:
            layer = name.split("encoder.layer.")[1].split(".")[0]
            site = "mh_adapter" if ".attention." in name else "output_adapter"
            shared = case.meta["hyperparameters"]["scalearn"]["per_layer_shared"]
            key = "scalearn.shared.omega" if shared else f"scalearn.layer{layer}.{site}.omega"
        assert key not in found, key
        found[key] = parameter
    stored = {k for k in case.tensors if k.startswith(("scalearn.", "encoder."))}
    assert found.keys() == stored, found.keys() ^ stored
    return found


def forward_and_back(model: Any, case: Any) -> tuple[float, torch.Tensor]:
    """Differences of the outputs, and the gradient at the embeddings."""
    t = case.tensors
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_(True))
        return kept[-1]

    handle = model.embeddings.register_forward_hook(keep)
    result = model(**{n: t[n] for n in ("input_ids", "attention_mask", "token_type_ids")}, output_hidden_states=True)
    handle.remove()
    loss = (t["loss_weight.last_hidden_state"] * result.last_hidden_state).sum()
    loss = loss + (t["loss_weight.pooler_output"] * result.pooler_output).sum()
    loss.backward()
    computed = {f"layer_output.{i}": h for i, h in enumerate(result.hidden_states[1:])}
    computed |= {"pooler_output": result.pooler_output, "loss": loss}
    worst = difference(t["embedding_output"], kept[0].detach())
    for name, value in computed.items():
        if name in t:
            scale = max(1.0, t[name].abs().max().item()) if name == "loss" else 1.0
            worst = max(worst, difference(t[name], value.detach()) / scale)
    assert kept[0].grad is not None
    return worst, kept[0].grad


def compare_singles(model: Any, case: Any, names: list[str]) -> tuple[float, float]:
    """Each source alone, and the fusion with its coefficient 1 and the others 0."""
    from adapters.composition import Fuse

    worst = 0.0
    inputs = {n: case.tensors[n] for n in ("input_ids", "attention_mask", "token_type_ids")}
    for name in names:
        fixed = {other: float(other == name) for other in names}
        model.add_adapter_fusion(Fuse(*names), config=pal_adapters.ScaLearnConfig(fixed=fixed), overwrite_ok=True)
        for setup in (name, Fuse(*names)):
            model.set_active_adapters(setup)
            with torch.no_grad():
                result = model(**inputs)
            for part in ("last_hidden_state", "pooler_output"):
                worst = max(worst, difference(case.tensors[f"single.{name}.{part}"], result[part]))
    return worst, 0.0


def compare(case: Any, host: str) -> tuple[float, float] | None:
    """Maximal differences of outputs and gradients, or None where the case says nothing about this host."""
    if case.name == "scalearn_sampling":
        return compare_sampling(case) if host == "layer" else None
    if "up_list" in case.tensors:
        return compare_module(case) if host == "layer" else None
    if host == "adapters":
        return compare_adapters(case)
    if host == "peft":
        from . import check_peft_fusion

        with tempfile.TemporaryDirectory() as folder:
            return check_peft_fusion.compare(case, pathlib.Path(folder))
    return regularize(case) if host == "layer" else None
