"""Compares the methods with numbers that the authors' code computed.

    python tests/golden/check.py --golden DIR [--host adapters|peft|layer] [--case NAME]

For every case in DIR: builds `BertModel` from `DIR/base`, adds the method through the host's public API (`--host
layer`: calls the plain modules), loads the case's weights and compares every stored output and gradient. Prints one
line a case and a JSON line last. Exit status 0 only if at least one case ran and all that ran are within 2e-5. Cases
that say nothing about the host, or that are of no method of this package, are listed as `not yet`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import BertModel

import pal_adapters
from pal_adapters.methods.houlsby.config import ParallelHoulsbyOptions
from pal_adapters.methods.houlsby.layer import HoulsbyPAL, ParallelHoulsby
from pal_adapters.methods.lhuc.layer import LHUC
from pal_adapters.methods.low_rank.layer import LowRank
from pal_adapters.methods.pal.config import PALOptions
from pal_adapters.methods.pal.layer import PAL
from pal_adapters.methods.top.config import TopAttentionOptions
from pal_adapters.methods.top.layer import TopAttention, TopBertLayer
from pal_adapters.nn.bottleneck import Projections
from pal_adapters.nn.unit import TaskUnit, UnitInputs

if __package__:
    from . import camtl, fusion_cases
else:  # called as a command
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    from . import camtl, fusion_cases

TOLERANCE = 2e-5
REPOSITORY = "AsaCooperStickland/Bert-n-Pals"
Tensors = dict[str, torch.Tensor]


class Case:
    """One golden case: its description and tensors."""

    def __init__(self, directory: pathlib.Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.meta = json.loads((directory / f"{name}.json").read_text())
        self.tensors: Tensors = {}
        for file in self.meta.get("files", []):
            self.tensors.update(load_file(directory / file))

    @property
    def repository(self) -> str:
        return self.meta["reference"]["repository"]

    @property
    def ours(self) -> bool:
        return self.repository in (REPOSITORY, camtl.REPOSITORY, fusion_cases.REPOSITORY)

    @property
    def reference(self) -> dict[str, Any]:
        return self.meta.get("hyperparameters", {}).get("reference_config") or {}

    @property
    def tasks(self) -> list[int]:
        return sorted({int(k[4:].split(".")[0]) for k in self.tensors if k.startswith("task")})

    def size(self, *parts: str) -> int:
        """First dimension of the first tensor whose name has all parts."""
        return next(t.shape[0] for k, t in self.tensors.items() if all(p in k for p in parts))

    def bert(self) -> BertModel:
        layers = self.meta["hyperparameters"]["num_hidden_layers"]
        return BertModel.from_pretrained(self.directory / "base", num_hidden_layers=layers).eval()


def method_of(case: Case) -> tuple[str, dict[str, Any]] | None:
    """The method and its arguments, from the reference's switches and the sizes of the stored tensors."""
    flags = case.reference
    if flags.get("top") and flags.get("bert_lay_top"):
        heads = case.meta["hyperparameters"]["num_attention_heads"]
        return "top_bert_layer", {
            "num_heads": heads,
            "intermediate_size": case.size("top.", "intermediate.dense.weight"),
        }
    if flags.get("top"):
        layers = 1 + max(
            int(k.split("layer")[1].split(".")[0]) for k in case.tensors if k.startswith("top.task0.layer")
        )
        return "top_attention", {"hidden_size": case.size("top.", "encoder.weight"), "num_layers": layers}
    if flags.get("houlsby") and flags.get("pals"):
        sizes = {
            "bottleneck_size": case.size("houlsby.", "encoder.weight"),
            "hidden_size": case.size("pals.", "encoder.weight"),
        }
        return "houlsby_pal", sizes
    if flags.get("houlsby"):
        return "parallel_houlsby", {"hidden_size": case.size("houlsby.", "encoder.weight")}
    lhuc = bool(flags.get("lhuc"))
    if flags.get("mult") and flags.get("pals"):
        return "pal", {"hidden_size": case.size("pals.", "encoder.weight"), "lhuc": lhuc}
    if flags.get("mult"):
        return "low_rank", {"hidden_size": case.size("lowrank.", "encoder.weight"), "lhuc": lhuc}
    return ("lhuc", {}) if lhuc else None


CONFIGS = {
    "pal": "PAL",
    "low_rank": "LowRank",
    "lhuc": "LHUC",
    "top_attention": "TopAttention",
    "top_bert_layer": "TopBertLayer",
    "parallel_houlsby": "ParallelHoulsby",
    "houlsby_pal": "HoulsbyPAL",
}


def golden_names(method: str, task: int, layer: int) -> Iterator[tuple[str, str]]:
    """Pairs of (prefix in the golden file, prefix among a unit's weights); the longest golden prefix wins."""
    if method in ("pal", "houlsby_pal"):
        own = "pal." if method == "houlsby_pal" else ""
        yield f"pals.task{task}.layer{layer}.", own
        yield f"pals.task{task}.encoder.", "encoder."
        yield f"pals.task{task}.decoder.", "decoder."
        yield f"houlsby.task{task}.layer{layer}.attention.", "attention."
    if method == "low_rank":
        yield f"lowrank.task{task}.layer{layer}.", ""
    if method == "parallel_houlsby":
        yield f"houlsby.task{task}.layer{layer}.", ""
    if method == "top_attention":
        for i in range(64):
            yield f"top.task{task}.layer{i}.", f"layers.{i}."
        yield f"top.task{task}.", ""
    if method == "top_bert_layer":
        block = f"top.task{task}.block."
        yield f"{block}attention.self.", "attention."
        yield f"{block}attention.output.", "attention."
        yield f"{block}intermediate.dense.", "intermediate."
        yield f"{block}output.", ""
    yield f"lhuc.task{task}.layer{layer}", "rho"


def pairs(case: Case, method: str, unit: TaskUnit, task: int, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Golden names with the unit's tensors."""
    weights = unit.weights()
    for name in case.tensors:
        for golden, own in golden_names(method, task, layer):
            if name.startswith(golden) and (own + name.removeprefix(golden)) in weights:
                yield name, weights[own + name.removeprefix(golden)]
                break


def add_with_adapters(model: BertModel, case: Case, method: str, arguments: dict[str, Any]) -> Callable[[int], None]:
    import adapters

    config = getattr(pal_adapters, f"{CONFIGS[method]}Config")(**arguments)
    adapters.init(model)
    for task in case.tasks:
        model.add_adapter(f"task{task}", config=config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return lambda task: model.set_active_adapters(f"task{task}")


def add_with_peft(model: BertModel, case: Case, method: str, arguments: dict[str, Any]) -> Callable[[int], None]:
    from peft import get_peft_model

    config = getattr(pal_adapters, f"{CONFIGS[method]}PeftConfig")
    first, *others = case.tasks
    tuned = get_peft_model(model, config(**arguments), adapter_name=f"task{first}").eval()
    for task in others:
        tuned.add_adapter(f"task{task}", config(**arguments))

    def activate(task: int) -> None:
        tuned.set_adapter(f"task{task}")
        for parameter in tuned.parameters():
            parameter.requires_grad_(True)

    return activate


def units_of(model: BertModel, method: str, task: int) -> Iterator[tuple[int, TaskUnit]]:
    for index, block in enumerate(model.encoder.layer):
        if hasattr(block, "task_layer"):
            for unit in block.task_layer.units(f"task{task}"):
                yield index, unit
        elif hasattr(block, method):
            units = getattr(block, method).units
            if f"task{task}" in units:
                yield index, units[f"task{task}"]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b.reshape(a.shape)).abs().max().item()


def compare_encoder(case: Case, host: str) -> tuple[float, float]:
    """Maximal differences of outputs and of gradients."""
    found = method_of(case)
    method, arguments = found or ("pal", {"hidden_size": 12})  # the plain encoder: with a module that adds nothing
    model = case.bert()
    add = add_with_adapters if host == "adapters" else add_with_peft
    activate = add(model, case, method, arguments)
    outputs = gradients = 0.0
    for task in case.tasks:
        placed = 0
        for layer, unit in units_of(model, method, task):
            for name, tensor in pairs(case, method, unit, task, layer):
                tensor.data.copy_(case.tensors[name].reshape(tensor.shape))
                placed += 1
        if found is not None and not placed:
            raise RuntimeError(f"{case.name}: no weight of task {task} found its place")
    for task in case.tasks:
        activate(task)
        model.zero_grad()
        kept: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            output = output.detach().requires_grad_(True)
            kept.append(output)
            return output

        handle = model.embeddings.register_forward_hook(keep)
        names = ("input_ids", "attention_mask", "token_type_ids")
        result = model(**{n: case.tensors[n] for n in names}, output_hidden_states=True)
        handle.remove()
        last = result.last_hidden_state
        loss = (case.tensors["loss_weight.last_hidden_state"] * last).sum()
        loss = loss + (case.tensors["loss_weight.pooler_output"] * result.pooler_output).sum()
        loss.backward()
        prefix = f"task{task}."
        computed = {"pooler_output": result.pooler_output, "loss": loss}
        computed |= {f"layer_output.{i}": h for i, h in enumerate(result.hidden_states[1:])}
        computed[f"layer_output.{len(model.encoder.layer) - 1}"] = last
        for name, value in computed.items():
            if prefix + name in case.tensors:
                scale = max(1.0, case.tensors[prefix + name].abs().max().item()) if name == "loss" else 1.0
                outputs = max(outputs, difference(case.tensors[prefix + name], value) / scale)
        grads = {f"{prefix}grad.embedding_output": kept[0].grad}
        for layer, unit in units_of(model, method, task):
            grads |= {f"{prefix}grad.{n}": t.grad for n, t in pairs(case, method, unit, task, layer)}
        missing = [k for k in case.tensors if k.startswith(f"{prefix}grad.") and k not in grads]
        if missing:
            raise RuntimeError(f"{case.name}: no counterpart for {missing[0]}")
        for name, value in grads.items():
            if name in case.tensors:
                gradients = max(gradients, difference(case.tensors[name], value))
    return outputs, gradients


def compare_module(case: Case) -> tuple[float, float]:
    """One PAL called by itself."""
    t = case.tensors
    hidden_size, width = t["encoder.weight"].shape
    unit, shared = PAL(width, hidden_size).eval(), Projections(width, hidden_size)
    unit.share(shared)
    weights = unit.weights()
    for name, tensor in weights.items():
        tensor.data.copy_(t[name])
    x = t["x"].clone().requires_grad_(True)
    keep = t["attention_mask"].bool()[:, None, None]
    output = unit.term(x, UnitInputs(x=x, mask=lambda q, k: (keep, False)), weights)
    (output * t["g"]).sum().backward()
    grads = [difference(t[f"grad.{n}"], w.grad) for n, w in weights.items()] + [difference(t["grad.x"], x.grad)]
    return difference(t["output"], output.detach()), max(grads)


PLAIN_UNITS = {
    "pal": lambda d, a: PAL(d, a["hidden_size"], lhuc=a["lhuc"]),
    "low_rank": lambda d, a: LowRank(d, a["hidden_size"], lhuc=a["lhuc"]),
    "lhuc": lambda d, a: LHUC(d),
    "parallel_houlsby": lambda d, a: ParallelHoulsby(d, a["hidden_size"]),
    "houlsby_pal": lambda d, a: HoulsbyPAL(d, a["hidden_size"], a["bottleneck_size"]),
    "top_attention": lambda d, a: TopAttention(d, a["hidden_size"], num_layers=a["num_layers"]),
    "top_bert_layer": lambda d, a: TopBertLayer(d, a["intermediate_size"], num_heads=a["num_heads"]),
}


def compare_layer(case: Case) -> tuple[float, float]:
    """The plain modules inside a BERT block written out here; outputs only where the whole encoder is meant."""
    found = method_of(case)
    if found is None:
        raise RuntimeError("no module to call")
    method, arguments = found
    model = case.bert()
    keep = case.tensors["attention_mask"].bool()[:, None, None]
    bias = torch.zeros(keep.shape).masked_fill(~keep, -10000.0)
    outputs = gradients = 0.0
    for task in case.tasks:
        width = model.config.hidden_size
        shared: Projections | None = None
        units: list[TaskUnit] = []
        depth = len(model.encoder.layer)
        for layer in range(depth):
            if method.startswith("top") and layer < depth - 1:
                continue
            unit = PLAIN_UNITS[method](width, arguments).eval()
            if method in ("pal", "houlsby_pal"):
                shared = shared or Projections(width, arguments["hidden_size"])
                unit.share(shared)
            for name, tensor in pairs(case, method, unit, task, layer):
                tensor.data.copy_(case.tensors[name].reshape(tensor.shape))
            units.append(unit)
        x = start = case.tensors["embedding_output"].clone().requires_grad_(True)
        for layer, block in enumerate(model.encoder.layer):
            unit = units[0] if method.startswith("top") else units[layer]
            inputs = UnitInputs(x=x, mask=lambda q, k: (keep, False))

            def at(site: str, value: torch.Tensor, inputs: UnitInputs = inputs, unit: TaskUnit = unit) -> torch.Tensor:
                return unit(site, value, inputs, unit.weights()) if site in unit.sites else value

            a = block.attention
            heads = model.config.num_attention_heads
            q, k, v = (
                p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (a.self.query, a.self.key, a.self.value)
            )
            scores = (q @ k.transpose(-1, -2)) / (width // heads) ** 0.5 + bias
            context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            h = a.output.LayerNorm(x + at("attention", a.output.dense(context)))
            inputs = inputs._replace(h=h)
            o = block.output.dense(torch.nn.functional.gelu(block.intermediate.dense(h)))
            y = block.output.LayerNorm(h + at("residual", o, inputs))
            x = at("output", y, inputs)
            if layer == depth - 1:
                x = at("stack_output", x, inputs)
            stored = case.tensors.get(f"task{task}.layer_output.{layer}")
            if stored is not None:
                outputs = max(outputs, difference(stored, x.detach()))
        pooled = model.pooler(x)
        loss = (case.tensors["loss_weight.last_hidden_state"] * x).sum()
        loss = loss + (case.tensors["loss_weight.pooler_output"] * pooled).sum()
        loss.backward()
        grads = {"embedding_output": start.grad}
        for layer, unit in enumerate(units):
            index = depth - 1 if method.startswith("top") else layer
            grads |= {n: t.grad for n, t in pairs(case, method, unit, task, index)}
        for name, value in grads.items():
            stored = case.tensors.get(f"task{task}.grad.{name}")
            if stored is not None:
                gradients = max(gradients, difference(stored, value))
    return outputs, gradients


def compare_limits(case: Case) -> tuple[float, float]:
    """What the reference fails on late fails here early, and what runs there runs here."""
    wrong = 0
    for name, result in case.meta["results"].items():
        runs = str(result["forward"]).startswith("runs, ")
        size = int(name.split("=")[1]) if "=" in name else 24
        try:
            if name.startswith("BERTPals"):
                PALOptions(hidden_size=size).validate()
            elif name.startswith("top"):
                TopAttentionOptions(hidden_size=size, num_heads=12).validate()
            else:  # computed wrongly by the reference
                ParallelHoulsbyOptions(hidden_size=size, lhuc=True).validate()
            refused = False
        except ValueError:
            refused = True
        wrong += refused == runs
    return float(wrong), 0.0


def compare_sampling(case: Case) -> tuple[float, float]:
    """Probabilities of the tasks, epoch by epoch (the reference counts epochs from 0)."""
    from pal_adapters.multitask import annealed_alpha, task_probabilities

    results, sizes = case.meta["results"], case.meta["dataset_sizes"]
    epochs = int(case.meta["num_train_epochs"])
    alphas = [(1.0, results["prop"]), (0.5, results["sqrt"])]
    alphas += [(annealed_alpha(row["epoch"] + 1, epochs), row) for row in results["anneal"]]
    worst = 0.0
    for alpha, row in alphas:
        computed = torch.from_numpy(task_probabilities(sizes, alpha))
        stored = torch.tensor(row["probabilities"], dtype=torch.float64)
        worst = max(worst, abs(alpha - row["alpha"]), difference(stored, computed))
    return worst, 0.0


def compare(case: Case, host: str) -> tuple[float, float] | None:
    """Maximal differences of outputs and gradients, or None where the case says nothing about this host."""
    if case.repository == fusion_cases.REPOSITORY:
        return fusion_cases.compare(case, host)
    if case.repository == camtl.REPOSITORY:
        return camtl.compare(case, host)
    if "dataset_sizes" in case.meta:
        return compare_sampling(case) if host == "layer" else None
    if case.name.startswith("pal_limits"):
        return compare_limits(case) if host == "layer" else None
    if "x" in case.tensors:
        return compare_module(case) if host == "layer" else None
    if not case.tasks:
        return None
    if host == "layer":
        return compare_layer(case) if method_of(case) is not None else None
    return compare_encoder(case, host)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=pathlib.Path, required=True)
    parser.add_argument("--host", choices=("adapters", "peft", "layer"))
    parser.add_argument("--case")
    options = parser.parse_args(argv)
    if not options.golden.is_dir():
        parser.error(f"--golden {options.golden}: no such directory")
    names = sorted(p.stem for p in options.golden.glob("*.json"))
    if options.case is not None:
        if options.case not in names:
            parser.error(f"--case {options.case}: not in {options.golden}")
        names = [options.case]
    marks = {"adapters": "PALConfig", "peft": "PALPeftConfig"}
    hosts = [host for host, config in marks.items() if config in pal_adapters.__all__] + ["layer"]
    if options.host is not None:
        hosts = [options.host]
    report: dict[str, Any] = {}
    for name in names:
        case = Case(options.golden, name)
        if not case.ours:
            print(f"{name} not yet")
            report[name] = "not yet"
            continue
        for host in hosts:
            try:
                result = compare(case, host)
            except Exception as error:  # one broken case must not hide the others
                print(f"{name} {host} FAILED {type(error).__name__}: {error}")
                report[f"{name}/{host}"] = {"error": str(error)}
                continue
            if result is None:
                continue
            outputs, gradients = result
            good = outputs <= TOLERANCE and gradients <= TOLERANCE
            print(f"{name} {host} {'ok' if good else 'FAILED'} outputs {outputs:.2e} gradients {gradients:.2e}")
            report[f"{name}/{host}"] = {"outputs": outputs, "gradients": gradients, "ok": good}
    ran = [r for r in report.values() if isinstance(r, dict)]
    failed = [k for k, r in report.items() if isinstance(r, dict) and not r.get("ok")]
    print(json.dumps({"ran": len(ran), "failed": failed, "tolerance": TOLERANCE, "cases": report}))
    return 0 if ran and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
