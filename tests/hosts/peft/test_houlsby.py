"""The bottlenecks of Houlsby et al.: placement, norms, counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

import pal_adapters as pa
from pal_adapters.hooks.rows import RowPlan
from pal_adapters.hosts.peft.layer import entry
from pal_adapters.methods.houlsby import peft_layers
from pal_adapters.methods.houlsby.peft_layers import HoulsbyLayer, HoulsbyNorm

from . import cases, reference


def weights_of(model: Any, adapter: str) -> reference.Weights:
    saved = get_peft_model_state_dict(model, adapter_name=adapter)
    return {k.removeprefix("base_model.model."): v.detach() for k, v in saved.items()}


@pytest.mark.parametrize("seed", [0, 7])
def test_stands_behind_dropout_and_before_the_residual(seed: int) -> None:
    """In training, with the same random numbers: a bottleneck at another place sees another value."""
    model = cases.peft_model("houlsby").train()
    plain = cases.bert(attn_implementation="eager").train()
    given = cases.inputs()
    weights = weights_of(model, "rte")
    model.base_model.model.set_attn_implementation("eager")
    torch.manual_seed(seed)
    got = model(**given).logits
    torch.manual_seed(seed)
    expected = reference.bert_logits(plain, "houlsby", weights, given)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    torch.manual_seed(seed + 1)
    assert (model(**given).logits - got).abs().max() > 1e-2


def test_the_bottleneck_is_a_tanh_gelu() -> None:
    model = cases.peft_model("houlsby")
    layer = next(m for m in model.modules() if isinstance(m, HoulsbyLayer))
    unit = layer.units["rte"]
    u = torch.randn(2, 5, 24)
    inner = unit.down(u)
    tanh_gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    torch.testing.assert_close(layer.base_layer(u), u + unit.up(tanh_gelu))
    others = {"gelu": nn.functional.gelu, "relu": torch.relu, "silu": nn.functional.silu, "tanh": torch.tanh}
    for name, function in others.items():
        other = get_peft_model(cases.bert(), cases.config("houlsby", activation=name, init_weights=False))
        layer = next(m for m in other.eval().modules() if isinstance(m, HoulsbyLayer))
        unit = layer.units["default"]
        torch.testing.assert_close(layer.base_layer(u), u + unit.up(function(unit.down(u))))


@pytest.mark.parametrize(("changes", "std"), [({}, 1e-2), ({"init_std": 1e-3}, 1e-3)])
@pytest.mark.parametrize("identity", [True, False])
def test_initialisation(changes: dict[str, float], std: float, identity: bool) -> None:
    config = pa.HoulsbyPeftConfig(hidden_size=64, init_weights=identity, **changes)
    model = get_peft_model(cases.bert(hidden_size=96), config)
    parameters = dict(cases.adapter_parameters(model, "default"))
    down = torch.cat([p.flatten() for n, p in parameters.items() if n.endswith("down.weight")])
    up = torch.cat([p.flatten() for n, p in parameters.items() if n.endswith("up.weight")])
    for drawn in (down,) if identity else (down, up):
        assert drawn.abs().max() <= 2 * std
        # A normal cut at two standard deviations keeps 0.88 of its own.
        assert abs(drawn.std() / std - 0.8796) < 0.01
        assert abs(drawn.mean()) < 0.02 * std
    assert bool((up == 0).all()) is identity
    assert all((p == 0).all() for n, p in parameters.items() if n.endswith(("down.bias", "up.bias")))
    plain = cases.bert(hidden_size=96)
    for name, parameter in parameters.items():
        if "houlsby_norms" in name:
            original = name.removeprefix("base_model.model.").replace(".houlsby_norms.default", "")
            assert torch.equal(parameter, plain.get_parameter(original))


def test_what_trains() -> None:
    """Bottlenecks, every layer norm and the head; not the pooler."""
    model = cases.peft_model("houlsby")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    norms = {n.split(".houlsby_norms")[0] for n in trained if "houlsby_norms" in n}
    assert len(norms) == 2 * 3 + 1
    assert "base_model.model.bert.embeddings.LayerNorm" in norms
    assert not any("pooler" in n or "base_layer" in n for n in trained)
    assert any("classifier.modules_to_save.rte" in n for n in trained)


def test_norms_belong_to_the_adapter() -> None:
    """Trained, stored and swapped with it; the base model's own stay."""
    model = cases.peft_model("houlsby", adapters=("rte", "sst"))
    given = cases.inputs()
    before = cases.state(model)
    model.set_adapter("rte")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**given, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    model.eval()
    after = model.state_dict()
    for name, value in before.items():
        moved = not torch.equal(after[name], value)
        assert moved is (".rte." in name), name
    saved = get_peft_model_state_dict(model, adapter_name="rte")
    norms = [name for name in saved if "houlsby_norms" in name]
    assert len(norms) == 2 * 7
    # Without the bottlenecks, what is left of the adapter are its norms and its head.
    for layer in [m for m in model.modules() if isinstance(m, HoulsbyLayer)]:
        layer.set_adapter([])
    plain = cases.bert()
    own = {n.removeprefix("base_model.model.").replace(".houlsby_norms", ""): saved[n] for n in norms}
    plain.load_state_dict(own, strict=False)
    plain.classifier.load_state_dict({k.rpartition(".")[2]: v for k, v in saved.items() if ".classifier." in k})
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, plain(**given).logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "size", "norms", "total"),
    [(12, 768, 12, 64, 38_400, 2_417_664), (24, 1024, 16, 64, 100_352, 6_444_032), (12, 768, 12, 8, 38_400, 351_936),
     (24, 1024, 16, 256, 100_352, 25_327_616)],
)  # fmt: skip
def test_counts(layers: int, width: int, heads: int, size: int, norms: int, total: int) -> None:
    """The published counts, on models without weights."""
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width
    )
    with torch.device("meta"):
        base = transformers.BertModel(config)
    model = get_peft_model(base, pa.HoulsbyPeftConfig(hidden_size=size))
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "meta"
        if parameter.requires_grad:
            counts["houlsby_norms" in name] += parameter.numel()
    assert counts == {True: norms, False: total - norms}
    if (layers, size) == (12, 64):
        assert counts[False] == 2_379_264
    assert model.get_nb_trainable_parameters()[0] == total
    frozen = get_peft_model(model.unload(), pa.HoulsbyPeftConfig(hidden_size=size, train_layernorm=False))
    assert frozen.get_nb_trainable_parameters()[0] == total - norms


def test_without_layer_norms() -> None:
    model = cases.peft_model("houlsby", train_layernorm=False)
    assert not any(isinstance(m, HoulsbyNorm) for m in model.modules())
    given = cases.inputs()
    expected = reference.bert_logits(cases.bert(), "houlsby", weights_of(model, "rte"), given)
    torch.testing.assert_close(cases.run(model, "rte", given), expected.detach(), atol=2e-5, rtol=1e-4)


def test_norms_of_a_subset_of_blocks() -> None:
    """Only norms of the selected blocks are adapted, not those of other blocks or the embeddings."""
    model = get_peft_model(cases.bert(), cases.config("houlsby", layers_to_transform=[1]))
    norms = {n for n, m in model.named_modules() if isinstance(m, HoulsbyNorm)}
    layer = "base_model.model.bert.encoder.layer.1"
    assert norms == {f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"}


@pytest.mark.parametrize(
    ("name", "norms"), [("llama", 2 * 2 + 1), ("qwen3", 4 * 2 + 1), ("gpt2", 2 * 2 + 1), ("t5", 5 + 7)]
)
def test_norms_of_other_models(name: str, norms: int) -> None:
    """RMS norms, and norms inside attention, each with a copy for every adapter."""
    model = cases.peft_model("houlsby", name, adapters=("rte", "sst"))
    found = [m for m in model.modules() if isinstance(m, HoulsbyNorm)]
    assert len(found) == norms
    assert all(set(norm.units) == {"rte", "sst"} for norm in found)
    given = cases.inputs(name)
    outputs = [cases.run(model, adapter, given) for adapter in ("rte", "sst", None)]
    assert torch.equal(outputs[2], cases.run(cases.BUILDERS[name](), None, given))
    # Each of them matters: putting the base model's norm back changes the output.
    for norm in found:
        kept = norm.units["rte"].weight.data.clone()
        norm.units["rte"].weight.data.copy_(norm.base_layer.weight.data)
        changed = cases.run(model, "rte", given)
        norm.units["rte"].weight.data.copy_(kept)
        assert not torch.equal(changed, outputs[0])
    assert torch.equal(cases.run(model, "rte", given), outputs[0])


def test_attributes_of_a_wrapped_norm() -> None:
    model = cases.peft_model("houlsby")
    norm = model.base_model.model.bert.embeddings.LayerNorm
    assert norm.eps == 1e-12
    assert norm.normalized_shape == (24,)
    assert norm.weight is norm.base_layer.weight
    assert norm.bias is norm.base_layer.bias
    with pytest.raises(AttributeError, match="nothing"):
        norm.nothing  # noqa: B018


def test_hooks_on_a_norm_act_whichever_copy_runs() -> None:
    base = cases.bert()
    seen: list[str] = []
    handle = base.bert.embeddings.LayerNorm.register_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    model = get_peft_model(base, cases.config("houlsby"), "rte").eval()
    given = cases.inputs()
    cases.run(model, "rte", given)
    cases.run(model, None, given)
    assert seen == ["HoulsbyNorm", "HoulsbyNorm"]
    copy = model.base_model.model.bert.embeddings.LayerNorm.units["rte"]
    assert not copy._forward_hooks
    unloaded = model.unload()
    cases.run(unloaded, None, given)
    assert seen[2:] == ["LayerNorm"]
    handle.remove()
    assert not unloaded.bert.embeddings.LayerNorm._forward_hooks


@pytest.mark.usefixtures("transformers_takes_this_peft")
def test_a_norm_beside_another_method() -> None:
    """A module on top hooks the final norm, which Houlsby then replaces."""
    base = cases.llama()
    base.add_adapter(cases.config("top_attention"), "top")
    cases.randomise(base, "top", seed=0)
    given = cases.inputs("llama")
    top = cases.run(base.eval(), None, given)
    base.add_adapter(cases.config("houlsby"), "seq")
    base.set_adapter(["top", "seq"])
    assert torch.equal(cases.run(base.eval(), None, given), top)
    cases.randomise(base, "seq", seed=1)
    assert not torch.equal(cases.run(base, None, given), top)
    base.set_adapter("top")
    assert torch.equal(cases.run(base, None, given), top)


def test_two_sets_of_norms_are_refused() -> None:
    model = get_peft_model(cases.bert(), cases.config("houlsby"), "rte").eval()
    model.add_adapter("sst", cases.config("houlsby"))
    model.base_model.set_adapter(["rte", "sst"])
    with pytest.raises(pa.UnsupportedError, match="has its own layer norms"):
        model(**cases.inputs())
    model.set_adapter("rte")
    model(**cases.inputs())


@pytest.mark.parametrize("together", [True, False], ids=["one product", "a call per task"])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_norms_of_a_mixed_batch(together: bool, tokens_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example through its own copy, values and gradients; examples without an adapter through the base's."""
    monkeypatch.setattr(peft_layers, "batches_tasks", lambda device: together)
    model = cases.peft_model("houlsby", adapters=("rte", "sst")).train()
    norm = next(module for module in model.modules() if isinstance(module, HoulsbyNorm))
    norm._tokens_first = tokens_first
    draw = torch.Generator().manual_seed(0)
    names = ["sst", "__base__", "rte", "sst", "rte"]
    own: list[Any] = [entry(norm.units, name, norm.base_layer) for name in names]
    for copied in norm.units.values():
        for parameter in copied.parameters():
            parameter.data.normal_(generator=draw)
            parameter.requires_grad_()
    x = torch.randn(5, 3, norm.base_layer.weight.shape[0], generator=draw, requires_grad=True)
    weight = torch.randn(x.shape, generator=draw)
    trained = [x, *(p for copied in norm.units.values() for p in copied.parameters())]
    apart = torch.stack([
        torch.nn.functional.layer_norm(row, row.shape[-1:], one.weight, one.bias, one.eps)
        for row, one in zip(x, own, strict=True)
    ])  # fmt: skip
    with norm.plans.bound(RowPlan(names, keep=False)):
        mixed = norm(x.transpose(0, 1)).transpose(0, 1) if tokens_first else norm(x)
    torch.testing.assert_close(mixed, apart, atol=1e-6, rtol=0)
    found, expected = (torch.autograd.grad((y * weight).sum(), trained) for y in (mixed, apart))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_norms_of_a_mixed_batch_keep_no_more_than_those_of_one_task() -> None:
    model = cases.peft_model("houlsby", adapters=("rte", "sst")).train()
    norm = next(module for module in model.modules() if isinstance(module, HoulsbyNorm))
    x = torch.randn(4, 3, norm.base_layer.weight.shape[0], requires_grad=True)

    def kept(names: list[str]) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with norm.plans.bound(RowPlan(names, keep=False)):
                y = norm(x * 2)
        assert y.requires_grad
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for at, size in sizes.items() if at not in own)

    numbers = 4 * 8  # the examples' places, int64
    assert kept(["rte", "sst", "sst", "rte"]) <= kept(["rte"] * 4) + 2 * numbers
