"""The CA-MTL cases of the golden numbers: modules alone, whole encoders through each host, and MT-uncertainty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.methods.camtl.attention import ConditionalAttentionBias, block_layout
from pal_adapters.methods.camtl.bottleneck import ConditionalBottleneck
from pal_adapters.methods.camtl.film import FiLM, condition_of
from pal_adapters.methods.camtl.layer import ConditionalBlock
from pal_adapters.methods.camtl.norm import ConditionalNorm
from pal_adapters.methods.camtl.task import TaskConditions
from pal_adapters.nn.unit import batch_tasks

if TYPE_CHECKING:
    from .check import Case

REPOSITORY = "CAMTL/CA-MTL"
Result = tuple[float, float]
ADAPTER = "all"


def difference(a: Tensor, b: Tensor | None) -> float:
    if b is None:
        return float("inf")
    return float((a - b.detach().reshape(a.shape)).abs().max())


def _place(module: nn.Module, tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, nn.Parameter]:
    """Load golden tensors into a module and return its parameters by golden name."""
    parameters = dict(module.named_parameters())
    placed = {}
    with torch.no_grad():
        for golden, own in names.items():
            for name in tensors:
                if name == golden or name.startswith(f"{golden}."):
                    parameter = parameters[own + name.removeprefix(golden)]
                    parameter.copy_(tensors[name])
                    placed[name] = parameter
    return placed


def _run_module(t: dict[str, Tensor], prefix: str, module: nn.Module, names: dict[str, str], call: Any) -> Result:
    own = {k.removeprefix(prefix): v for k, v in t.items() if k.startswith(prefix)}
    placed = _place(module, own, names)
    table = own["task_table"].clone().requires_grad_(True)
    leaves = {"task_table": table}
    for name in ("x", "layer_norm.weight", "layer_norm.bias", "LayerNorm.weight", "LayerNorm.bias"):
        if name in own:
            leaves[name] = own[name].clone().requires_grad_(True)
    condition = condition_of(table, batch_tasks(own["task_id"]))
    output = call(module, leaves, condition)
    (output * own["g"]).sum().backward()
    computed = {f"grad.{n}": p.grad for n, p in (leaves | placed).items()}
    wanted = [n for n in own if n.startswith("grad.")]
    return difference(own["output"], output), max(difference(own[n], computed.get(n)) for n in wanted)


def _worst(results: list[Result]) -> Result:
    return max(r[0] for r in results), max(r[1] for r in results)


def _film(case: Case) -> Result:
    def call(module: Any, leaves: dict[str, Tensor], condition: Any) -> Tensor:
        y = module(leaves["x"], condition)
        if "layer_norm.weight" in leaves:
            y = F.layer_norm(y, y.shape[-1:], leaves["layer_norm.weight"], leaves["layer_norm.bias"], 1e-5)
        return y

    results = []
    for v in case.meta["hyperparameters"]["variants"]:
        module = FiLM(v["input_size"], v["output_size"])
        results.append(
            _run_module(case.tensors, f"variant{v['variant']}.", module, {"gb_weights": "modulation"}, call)
        )
    return _worst(results)


def _cbda(case: Case) -> Result:
    def call(module: ConditionalAttentionBias, leaves: dict[str, Tensor], condition: Any) -> Tensor:
        slots = torch.arange(module.max_length)[None]
        return condition.rows(module(condition, slots, slots, module.max_length))

    results = []
    for v in case.meta["hyperparameters"]["variants"]:
        module = ConditionalAttentionBias(v["hidden_size"], v["max_seq_length"])
        if block_layout(v["hidden_size"], v["max_seq_length"]) != (len(v["rows_of_the_pieces"]), v["block_cols"]):
            return float("inf"), float("inf")
        names = {"random_weight_matrix": "matrix", "gb_weights": "film.modulation"}
        results.append(_run_module(case.tensors, f"variant{v['variant']}.", module, names, call))
    return _worst(results)


def _norm(case: Case) -> Result:
    def call(module: ConditionalNorm, leaves: dict[str, Tensor], condition: Any) -> Tensor:
        eps = case.meta["hyperparameters"].get("layer_norm_eps", case.meta["hyperparameters"].get("eps"))
        x, weight, bias = (leaves[name] for name in ("x", "LayerNorm.weight", "LayerNorm.bias"))
        x_hat = F.layer_norm(x, x.shape[-1:], eps=eps)
        return module(x_hat * weight + bias, x_hat, weight, bias, condition)

    module = ConditionalNorm(case.tensors["x"].shape[-1])
    return _run_module(case.tensors, "", module, {"gb_weights": "film.modulation"}, call)


_BOTTLENECK = {
    "emb_transf": "embedding",
    "gb_weights": "film.modulation",
    "down_proj_layer": "down",
    "up_proj_layer": "up",
}


def _bottleneck(case: Case) -> Result:
    module = ConditionalBottleneck(case.tensors["x"].shape[-1])
    return _run_module(case.tensors, "", module, _BOTTLENECK, lambda m, leaves, c: m(leaves["x"], c))


# Whole encoders


def _shared_names() -> Iterator[tuple[str, str]]:
    yield "task_type_embeddings.weight", "task_embedding"
    for part in ("weight", "bias"):
        yield f"conditional_alignment.gb_weights.{part}", f"alignment.modulation.{part}"
        yield f"task_transformation.{part}", f"transformation.{part}"


def _block_names(layer: int, depth: int, stream: bool) -> Iterator[tuple[int, str, str]]:
    """Unit, golden name and name in the unit."""
    golden = f"layer{layer}"
    yield layer, f"{golden}.cbda.random_weight_matrix", "attention.matrix"
    for part in ("weight", "bias"):
        yield layer, f"{golden}.cbda.gb_weights.{part}", f"attention.film.modulation.{part}"
        for norm, path in (
            ("attention_layernorm", "attention__output__LayerNorm"),
            ("output_layernorm", "output__LayerNorm"),
        ):
            yield layer, f"{golden}.{norm}.gb_weights.{part}", f"norms.{path}.film.modulation.{part}"
        for theirs, ours in _BOTTLENECK.items():
            number = layer if stream else 0
            yield depth - 1, f"{golden}.adapter.{theirs}.{part}", f"bottlenecks.{number}.{ours}.{part}"
        yield depth - 1, f"{golden}.adapter.LayerNorm.{part}", f"closing_norm.{part}"
        yield depth - 1, f"{golden}.adapter.layernorm.gb_weights.{part}", f"closing_norm.film.modulation.{part}"
        for path in ("attention.output.LayerNorm", "output.LayerNorm"):
            key = f"{path}.{part}".replace(".", "__")
            yield layer, f"base.encoder.layer.{layer}.{path}.{part}", f"base.{key}"


def _config(case: Case, *, train_base: bool = True) -> dict[str, Any]:
    values = case.meta["hyperparameters"]
    return {
        "tasks": values["num_tasks"],
        "max_length": values["max_seq_length"],
        "bottleneck": "stream" if "film_output.0" in case.tensors else "top",
        "train_base": train_base,
    }


def _with_peft(model: nn.Module, config: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Tensor]]:
    from peft import get_peft_model

    import pal_adapters

    tuned = get_peft_model(model, pal_adapters.CAMTLPeftConfig(**config), adapter_name=ADAPTER).eval()  # type: ignore[arg-type]
    layers = [block.ca_mtl for block in model.encoder.layer]  # type: ignore[union-attr]
    return tuned, [layer.units[ADAPTER] for layer in layers], dict(layers[0].shared[ADAPTER].named_parameters())


def _with_adapters(model: nn.Module, config: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Tensor]]:
    import adapters

    import pal_adapters

    adapters.init(model)
    model.add_adapter(ADAPTER, config=pal_adapters.CAMTLConfig(**config))
    model.train_adapter(ADAPTER)
    model.eval()
    layers = [block.task_layer for block in model.encoder.layer]  # type: ignore[union-attr]
    units = [next(iter(layer.units(ADAPTER))) for layer in layers]
    return model, units, dict(units[0].shared_weights())


def _parameters(case: Case, units: list[Any], shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters by golden name, with the golden values in them."""
    stream = "film_output.0" in case.tensors
    found = {golden: shared[own] for golden, own in _shared_names() if own in shared}
    for layer in range(len(units)):
        for unit, golden, own in _block_names(layer, len(units), stream):
            if golden in case.tensors or f"grad.{golden}" in case.tensors:
                found[golden] = dict(units[unit].named_parameters())[own]
    with torch.no_grad():
        for golden, parameter in found.items():
            if golden in case.tensors:
                parameter.copy_(case.tensors[golden])
    return found


def _compare_run(case: Case, computed: dict[str, Tensor], parameters: dict[str, Tensor], start: Tensor) -> Result:
    t = case.tensors
    loss = (t["loss_weight.last_hidden_state"] * computed["last_hidden_state"]).sum()
    loss = loss + (t["loss_weight.pooler_output"] * computed["pooler_output"]).sum()
    loss.backward()
    outputs = [
        difference(t[n], computed.get(n)) for n in t if n in computed or n.startswith(("layer_output", "film_output"))
    ]
    outputs.append(difference(t["loss"], loss) / max(1.0, float(t["loss"].abs())))
    grads = {f"grad.{n}": p.grad for n, p in parameters.items()} | {"grad.embedding_output": start.grad}
    wanted = [n for n in t if n.startswith("grad.")]
    return max(outputs), max(difference(t[n], grads.get(n)) for n in wanted)


def _encoder(case: Case, host: str) -> Result:
    model: Any = case.bert()
    add = _with_adapters if host == "adapters" else _with_peft
    tuned, units, shared = add(model, _config(case))
    parameters = _parameters(case, units, shared)
    computed: dict[str, Tensor] = {}
    start: list[Tensor] = []

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            computed[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def leaf(module: Any, args: Any, output: Tensor) -> Tensor:
        start.append(output.detach().requires_grad_(True))
        computed["embedding_output"] = start[0]
        return start[0]

    def aligned(module: Any, args: Any, kwargs: Any) -> None:
        computed["aligned_embedding_output"] = args[0] if args else kwargs["hidden_states"]

    model.embeddings.register_forward_hook(leaf)
    model.encoder.layer[0].attention.register_forward_pre_hook(aligned, with_kwargs=True)
    for i, block in enumerate(model.encoder.layer):
        block.register_forward_hook(keep(f"layer_output.{i}"))
    for i, bottleneck in enumerate(units[-1].bottlenecks):
        bottleneck.register_forward_hook(keep(f"film_output.{i}"))
    inputs = {n: case.tensors[n] for n in ("input_ids", "attention_mask", "token_type_ids")}
    result = tuned(**inputs, task_ids=case.tensors["task_id"])
    computed["last_hidden_state"], computed["pooler_output"] = result.last_hidden_state, result.pooler_output
    return _compare_run(case, computed, parameters, start[0])


def _encoder_by_hand(case: Case) -> Result:
    """The plain modules inside BERT blocks written out here."""
    model: Any = case.bert()
    t, config = case.tensors, _config(case)
    depth, width = len(model.encoder.layer), model.config.hidden_size
    stream = config["bottleneck"] == "stream"
    shared = TaskConditions(width, config["tasks"])
    norms = ("attention.output.LayerNorm", "output.LayerNorm")
    units = []
    for layer, block in enumerate(model.encoder.layer):
        last = layer == depth - 1
        unit = ConditionalBlock(
            width,
            max_length=config["max_length"],
            norms=norms if layer >= depth - depth // 2 else (),
            bottlenecks=(depth if stream else 1) if last else 0,
            closing_norm="own" if last and not stream else "none",
        )
        unit.share(shared)
        for path in norms:
            for part in ("weight", "bias"):
                unit.base[f"{path}.{part}".replace(".", "__")] = block.get_parameter(f"{path}.{part}")
        units.append(unit)
    parameters = _parameters(case, units, dict(shared.named_parameters()))
    index, eps, heads = batch_tasks(t["task_id"]), model.config.layer_norm_eps, model.config.num_attention_heads
    hidden = torch.zeros(t["attention_mask"].shape).masked_fill(t["attention_mask"] == 0, -10000.0)[:, None, None]
    start = t["embedding_output"].clone().requires_grad_(True)
    x = units[0].align(start, index)
    computed: dict[str, Tensor] = {"aligned_embedding_output": x}
    for layer, (unit, block) in enumerate(zip(units, model.encoder.layer, strict=True)):

        def norm(path: str, value: Tensor, unit: Any = unit, block: Any = block) -> Tensor:
            plain = block.get_submodule(path)
            if path in unit.norm_paths:
                x_hat = F.layer_norm(value, value.shape[-1:], eps=eps)
                return unit.norm(path, plain(value), x_hat, plain.weight, plain.bias, index)
            return plain(value)

        a = block.attention
        q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (a.self.query, a.self.key, a.self.value))
        slots = torch.arange(x.shape[1])[None]
        scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
        scores = scores + unit.attention_bias(index, slots, slots, x.shape[1])
        context = ((scores + hidden).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = norm(norms[0], x + a.output.dense(context))
        x = norm(norms[1], h + block.output.dense(F.gelu(block.intermediate.dense(h))))
        if unit.acts_at_top:
            x = unit.top(x, h, eps, index)
        computed[f"layer_output.{layer}"] = x
    if stream:
        condition, value = units[-1].condition(index), torch.zeros(())
        for layer, bottleneck in enumerate(units[-1].bottlenecks):
            value = bottleneck(computed[f"layer_output.{layer}"] + value, condition)
            computed[f"film_output.{layer}"] = value
        x = units[-1].stream([computed[f"layer_output.{i}"] for i in range(depth)], index)
    computed["last_hidden_state"], computed["pooler_output"] = x, model.pooler(x)
    return _compare_run(case, computed, parameters, start)


def _uncertainty(case: Case) -> Result:
    """Scores and chosen rows of one step; every row after the table look-up is the authors' code."""
    from pal_adapters.multitask.sampling.strategies import MultiTaskBatchSampler
    from pal_adapters.multitask.sampling.uncertainty import select_uncertain, uncertainty

    t, values = case.tensors, case.meta["hyperparameters"]
    logits = {}
    for number, task in enumerate(values["tasks"]):
        rows = t["pooled_output"][t["task_id"] == number]
        logits[task] = rows @ t[f"decoder.{number}.weight"].T + t[f"decoder.{number}.bias"]
    found = uncertainty(logits)
    worst = [difference(t[f"logits.{i}"], v) for i, v in enumerate(logits.values())]
    for name in ("entropy", "normalised", "score"):
        stored = t["entropy_normalized" if name == "normalised" else name]
        worst.append(difference(stored, torch.cat([getattr(u, name) for u in found.values()])))
    chosen = select_uncertain(logits, values["train_batch_size"])
    worst.append(difference(t["selected_scores"], chosen.scores))
    same = set(chosen.indices.tolist()) == set(t["selected_indices"].tolist())
    sampler = MultiTaskBatchSampler(values["dataset_sizes"], values["train_batch_size"], strategy="uncertainty")
    length = sampler.steps_per_epoch
    worst.append(0.0 if same and length == values["epoch_length"] else float("inf"))
    return max(worst), 0.0


_THEIRS = {
    "attention.self.random_weight_matrix": "attention.matrix",
    "attention.self.cond_block_diag_attn.gb_weights": "attention.film.modulation",
    "attention.output.LayerNorm.ln_weight_modulation.gb_weights": "norms.attention__output__LayerNorm.film.modulation",
    "output.LayerNorm.ln_weight_modulation.gb_weights": "norms.output__LayerNorm.film.modulation",
    "adapter.condlayernorm.ln_weight_modulation.gb_weights": "closing_norm.film.modulation",
    "adapter.condlayernorm": "closing_norm",
    "adapter.bottleneck.emb_transf": "bottlenecks.0.embedding",
    "adapter.bottleneck.hidden_modulation.gb_weights": "bottlenecks.0.film.modulation",
    "adapter.bottleneck.down_proj_layer": "bottlenecks.0.down",
    "adapter.bottleneck.up_proj_layer": "bottlenecks.0.up",
}


def _ours(theirs: str, depth: int) -> str | None:
    """Where a parameter of the reference is here: `shared.<name>`, `<block>.<name>`; None for a head."""
    name = theirs.removeprefix("bert.").replace(".new_", ".")
    if name.startswith("decoders."):
        return None
    if name.startswith("pooler."):
        return f"{depth - 1}.outer.{name.replace('.', '__')}"
    for golden, own in (
        ("task_type_embeddings.weight", "task_embedding"),
        ("conditional_alignment.gb_weights", "alignment.modulation"),
        ("encoder.task_transformation", "transformation"),
    ):
        if name.startswith(golden):
            return f"shared.{own}{name.removeprefix(golden)}"
    if name.startswith("encoder.adapter_layer."):
        number, _, rest = name.removeprefix("encoder.adapter_layer.").partition(".")
        own = _THEIRS["adapter.bottleneck." + rest.rpartition(".")[0]].replace(
            "bottlenecks.0", f"bottlenecks.{number}"
        )
        return f"{depth - 1}.{own}.{rest.rpartition('.')[2]}"
    number, _, rest = name.removeprefix("encoder.layer.").partition(".")
    for golden, own in _THEIRS.items():
        if rest.startswith(golden):
            return f"{number}.{own}{rest.removeprefix(golden)}"
    return f"{number}.base.{rest.replace('.', '__')}"


def _limits(case: Case, host: str) -> Result | None:
    """The parameters that train under the released freezing, name by name."""
    if host == "layer":
        return None
    from transformers import BertConfig, BertModel

    depth, wrong = 4, 0
    for network, bottleneck in (("base", "top"), ("large", "stream")):
        size = case.meta["hidden_size"]
        settings = BertConfig(hidden_size=size, num_hidden_layers=depth, num_attention_heads=4, vocab_size=50)
        add = _with_adapters if host == "adapters" else _with_peft
        config = {"tasks": 2, "bottleneck": bottleneck, "freeze_layers": [0, 1, 2], "freeze_rule": "code"}
        model: Any = BertModel(settings)
        _, units, shared = add(model, config)
        parts = {"shared": shared} | {str(i): dict(unit.named_parameters()) for i, unit in enumerate(units)}
        training = {f"{i}.{n}" for i, part in parts.items() for n, p in part.items() if p.requires_grad}
        listed = case.meta["results"][f"trainable after freeze_encoder_layers='0-2', CA-MTL-{network}, 4 layers"]
        wanted = {own for name in listed if (own := _ours(name, depth)) is not None}
        wrong += len(training ^ wanted)
        frozen_here = {id(p) for part in parts.values() for p in part.values()}
        wrong += sum(p.requires_grad for p in model.parameters() if id(p) not in frozen_here)
    return float(wrong), 0.0


_MODULES = {"camtl_film": _film, "camtl_cbda": _cbda, "camtl_cond_layernorm": _norm, "camtl_bottleneck": _bottleneck}


def compare(case: Case, host: str) -> Result | None:
    """Maximal differences of outputs and gradients, or None where the case says nothing about this host."""
    if case.name in _MODULES:
        return _MODULES[case.name](case) if host == "layer" else None
    if case.name.endswith("_encoder"):
        return _encoder_by_hand(case) if host == "layer" else _encoder(case, host)
    if case.name.startswith("mt_uncertainty"):
        return _uncertainty(case) if host == "layer" else None
    return _limits(case, host) if case.name == "camtl_limits" else None
