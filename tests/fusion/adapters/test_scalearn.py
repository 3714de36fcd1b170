"""ScaLearn in `adapters`: values, trained parameters, and allowed sources."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Iterator
from typing import Any

import adapters
import pytest
import torch
from adapters import AdapterConfig, AdapterTrainer, AutoAdapterModel
from adapters.composition import Fuse, Stack
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

import pal_adapters
from pal_adapters import ConfigError, ScaLearnConfig, UnknownAdapterError, UnsupportedError
from pal_adapters.hosts.adapters import fusion as adapters_fusion
from pal_adapters.hosts.adapters import sources as adapters_sources
from pal_adapters.hosts.adapters.fusion import Combination
from tests.hosts.adapters import test_model_classes as classes
from tests.hosts.adapters.tiny import SMALL, output, randomise, tiny_config
from tests.methods import names as method_names

VARIANTS = ["scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp"]
NAMES = ("a", "b", "c")
FUSE = Fuse(*NAMES)

# Whose sources are computed as one wide bottleneck, and whose are not.
WIDE = {
    "seq_bn": ["seq_bn[reduction_factor=4]"] * 3,
    "widths": ["seq_bn[reduction_factor=4]", "seq_bn[reduction_factor=8]", "seq_bn[reduction_factor=3]"],
    "double_seq_bn": ["double_seq_bn[reduction_factor=4]"] * 3,
    "par_bn": ["par_bn[reduction_factor=4]"] * 3,
    "scaling": ["par_bn[scaling=learned]", "par_bn[scaling=channel]", "par_bn[scaling=2.0]"],
    "post": ["seq_bn[residual_before_ln=False,original_ln_after=False]"] * 3,
}
NARROW = {
    "functions": ["seq_bn[non_linearity=relu]", "seq_bn[non_linearity=gelu]", "seq_bn[non_linearity=relu]"],
    "gate": ["seq_bn[use_gating=True]"] * 3,
    "norms": ["seq_bn[ln_before=True]", "seq_bn[ln_after=True]", "seq_bn[ln_after=True]"],
    "norm_of_all": ["seq_bn[ln_after=True,adapter_residual_before_ln=True]"] * 3,
    "compacter": ["compacter++[reduction_factor=3]"] * 3,
    "leave_out": ["seq_bn", "seq_bn", "seq_bn"],
    "sequential_and_parallel": ["seq_bn", "par_bn", "seq_bn"],
    "parallel_last": ["seq_bn", "seq_bn", "par_bn"],
    **{method: [method] * 3 for method in method_names("adapters", lambda record: record.method.fusable)},
    "mixture": ["pal", "seq_bn", "low_rank"],
    "mixture_parallel": ["seq_bn", "pal", "par_bn"],
}
SOURCES = {**WIDE, **NARROW}


def config_of(text: str) -> Any:
    if text in SMALL:
        return SMALL[text]
    kind, _, rest = text.rstrip("]").partition("[")
    values: dict[str, Any] = {"reduction_factor": 4}
    if kind == "compacter++":
        values["phm_dim"] = 2
    for pair in filter(None, rest.split(",")):
        key, value = pair.split("=")
        numbers: dict[str, Any] = {"True": True, "False": False, "2.0": 2.0}
        values[key] = numbers.get(value, int(value) if value.isdigit() else value)
    return AdapterConfig.load(kind, **values)


def with_sources(model: nn.Module, kind: str, names: tuple[str, ...] = NAMES) -> nn.Module:
    for index, (name, text) in enumerate(zip(names, SOURCES[kind], strict=True)):
        config = config_of(text)
        if kind == "leave_out":
            config = config.replace(leave_out=[index])
        model.add_adapter(name, config=config)
        randomise(model, name)
    return model


def omegas(model: nn.Module, fusion: str = "a,b,c") -> list[nn.Parameter]:
    """The coefficients of a fusion, shared ones once."""
    return [p for n, p in model.named_parameters() if f"adapter_fusion_layer.{fusion}." in n]


def fill(model: nn.Module, rows: list[float], fusion: str = "a,b,c") -> None:
    with torch.no_grad():
        for omega in omegas(model, fusion):
            omega.copy_(torch.tensor(rows)[:, None].expand_as(omega))


def randomise_omegas(model: nn.Module, fusion: str = "a,b,c") -> None:
    for omega in omegas(model, fusion):
        nn.init.normal_(omega, 0.5, 0.5)


def layers_of(model: nn.Module, fusion: str = "a,b,c") -> Iterator[Combination]:
    for _, layer in adapters_fusion.places(model, fusion):
        yield layer.adapter_fusion_layer[fusion]


# What the coefficients do


@pytest.mark.parametrize("kind", SOURCES)
def test_one_hot_is_the_source_and_zero_the_plain_model(kind: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, kind)
    bert.add_adapter_fusion(FUSE, config="scalearn")
    for index, name in enumerate(NAMES):
        fill(bert, [float(i == index) for i in range(3)])
        expected = output(bert, batch, name)
        torch.testing.assert_close(output(bert, batch, FUSE), expected, atol=2e-6, rtol=0)
        assert (expected - output(bert, batch, None)).abs().max() > 1e-2
    fill(bert, [0.0] * 3)
    if kind in ("post", "norm_of_all"):  # these change the host even where they add nothing
        return
    assert torch.equal(output(bert, batch, FUSE), output(bert, batch, None))


@pytest.mark.parametrize("kind", WIDE)
def test_wide_equals_one_source_after_the_other(
    kind: str, bert: nn.Module, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_sources(bert, kind)
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(omega_dropout=0.0))
    randomise_omegas(bert)
    calls = []
    original = adapters_sources.widen
    monkeypatch.setattr(adapters_sources, "widen", lambda *args: calls.append(1) or original(*args))
    grads = []
    for wide in (True, False):
        if not wide:
            monkeypatch.setattr(Combination, "wide", lambda self, sources: None)
        bert.set_active_adapters(FUSE)
        bert.zero_grad()
        value = bert(**batch).last_hidden_state
        (value * torch.linspace(0, 1, value.numel()).view_as(value)).sum().backward()
        grads.append([value.detach(), *(p.grad for p in omegas(bert)), *(p.grad for p in source_parameters(bert))])
    assert len(calls) == len(list(layers_of(bert)))  # once per place
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)


def source_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if ".adapters." in n or ".pal_adapters." in n]


@pytest.mark.parametrize("kind", NARROW)
def test_sources_that_differ_are_not_widened(
    kind: str, bert: nn.Module, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "leave_out":
        return  # the two that are left in a block are alike
    with_sources(bert, kind)
    bert.add_adapter_fusion(FUSE, config="scalearn")

    def never(*args: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(adapters_sources, "widen", never)
    assert output(bert, batch, FUSE).isfinite().all()


def test_a_hook_or_dropout_of_a_source_is_heeded(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config="scalearn")
    before = output(bert, batch, FUSE)
    source = bert.encoder.layer[1].output.adapters["b"]
    handle = source.register_forward_hook(lambda m, args, out: (out[0] * 2, *out[1:]))
    assert (output(bert, batch) - before).abs().max() > 1e-3
    handle.remove()
    seen: list[Tensor] = []
    handle = source.adapter_up.register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(output(bert, batch), before, atol=2e-6, rtol=1e-5)
    assert seen
    handle.remove()
    assert torch.equal(output(bert, batch), before)
    with torch.no_grad():  # in place and behind autograd's back, as loaders do
        source.adapter_up.weight.data.mul_(3)
    assert (output(bert, batch) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["seq_bn", "mixture"])
def test_a_block_is_linear_in_the_coefficients(kind: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    """Checked in the last block, by inverting its norm."""
    with_sources(bert, kind)
    bert.add_adapter_fusion(FUSE, config="scalearn_uniform")
    fill(bert, [0.0] * 3)
    last = list(layers_of(bert))[-1]
    seen: list[Tensor] = []
    norm = bert.encoder.layer[-1].output.LayerNorm
    norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))

    def summed(*rows: float) -> Tensor:
        with torch.no_grad():
            last.omega.copy_(torch.tensor(rows)[:, None])
        seen.clear()
        output(bert, batch, FUSE)
        return seen[-1]

    zero = summed(0, 0, 0)
    parts = [summed(*(float(i == j) for j in range(3))) - zero for i in range(3)]
    expected = zero + 0.5 * parts[0] - 2 * parts[1] + 3 * parts[2]
    torch.testing.assert_close(summed(0.5, -2, 3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["seq_bn", "widths", "mixture"])
def test_permuting_sources_with_their_rows_changes_nothing(
    kind: str, bert: nn.Module, batch: dict[str, Tensor]
) -> None:
    with_sources(bert, kind)
    bert.add_adapter_fusion(FUSE, config="scalearn")
    bert.add_adapter_fusion(Fuse("c", "a", "b"), config="scalearn")
    randomise_omegas(bert)
    for one, other in zip(omegas(bert), omegas(bert, "c,a,b"), strict=True):
        other.data.copy_(one[[2, 0, 1]])
    torch.testing.assert_close(
        output(bert, batch, FUSE), output(bert, batch, Fuse("c", "a", "b")), atol=2e-6, rtol=1e-5
    )


def test_rows_belong_to_names(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "widths")
    bert.add_adapter_fusion(FUSE, config="scalearn", name="all")
    randomise_omegas(bert, "all")
    expected = output(bert, batch, Fuse(*NAMES, name="all"))
    found = output(bert, batch, Fuse("b", "c", "a", name="all"))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    with pytest.raises(UnsupportedError, match="coefficients for a, b, c"):
        output(bert, batch, Fuse("a", "b", name="all"))


def test_the_shared_coefficients_are_one_tensor(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "double_seq_bn")
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(variant="scalearn++", omega_dropout=0.0))
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(omega_dropout=0.0), name="own")
    (shared,) = omegas(bert)
    assert [n for n in bert.state_dict() if "adapter_fusion_layer.a,b,c." in n] == [
        "encoder.layer.0.attention.output.adapter_fusion_layer.a,b,c.omega"
    ]
    nn.init.normal_(shared, 0.5, 0.5)
    own = omegas(bert, "own")
    assert len(own) == 6
    for omega in own:
        omega.data.copy_(shared)
    results = []
    for setup in (FUSE, Fuse(*NAMES, name="own")):
        bert.train_adapter_fusion(setup)
        bert.eval()
        bert(**batch).last_hidden_state.square().sum().backward()
        results.append(bert(**batch).last_hidden_state)
    assert torch.equal(*results)
    torch.testing.assert_close(shared.grad, sum(o.grad for o in own), rtol=1e-5, atol=1e-6)
    clone = copy.deepcopy(bert)
    (copied,) = omegas(clone)
    assert {id(layer.get_omega()) for layer in layers_of(clone)} == {id(copied)}
    assert copied is not shared


# Sizes, initial values, dropout


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ("scalearn", 73_728), ("scalearn_uniform", 96), ("scalearn_pp", 6_144), ("scalearn_uniform_pp", 8),
        ("scalearn++", 6_144), ("scalearn_uniform++", 8), ("dynamic", 21_252_096),
    ],
)  # fmt: skip
def test_parameters_at_bert_base(config: str, count: int) -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig(vocab_size=10))
        adapters.init(model)
        names = [f"s{i}" for i in range(8)]
        for name in names:
            model.add_adapter(name, config="seq_bn")
        model.add_adapter_fusion(Fuse(*names), config=config)
        model.train_adapter_fusion(Fuse(*names))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_initial_values(bert: nn.Module) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config="scalearn")
    drawn = torch.cat([o.flatten() for o in omegas(bert)])
    assert drawn.numel() == 3 * 3 * 24
    assert abs(drawn.mean().item() - 2 / 3) < 3e-4
    assert 8e-4 < drawn.std().item() < 1.2e-3
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(init_scale=1.0, init_std=0.0), name="own")
    assert all(torch.equal(o, torch.full_like(o, 1 / 3)) for o in omegas(bert, "own"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_is_of_the_coefficients_alone(variant: str, base_path: Any, batch: dict[str, Tensor]) -> None:
    model = BertModel.from_pretrained(base_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    adapters.init(model)
    with_sources(model, "double_seq_bn")
    model.add_adapter_fusion(FUSE, config=variant)
    model.train_adapter_fusion(FUSE)
    places = list(layers_of(model))
    p = places[0].dropout
    assert p == (0.0 if variant == "scalearn_uniform_pp" else 0.3)
    drawn: list[list[Tensor]] = []
    for place in places:
        calls: list[Tensor] = []
        place.register_forward_hook(lambda m, args, out, calls=calls: calls.append(out))
        drawn.append(calls)
    first = model(**batch).last_hidden_state
    assert all(len(calls) == 1 for calls in drawn)  # one mask per place and call, for all examples and tokens
    for place, (coefficients,) in zip(places, drawn, strict=True):
        scaled = place.get_omega() / (1 - p)
        kept = coefficients != 0
        torch.testing.assert_close(coefficients[kept], scaled.expand_as(kept)[kept])
    if p:
        assert not torch.equal(first, model(**batch).last_hidden_state)
    if variant in ("scalearn", "scalearn_pp"):
        masks = [calls[0] != 0 for calls in drawn]
        assert not any(torch.equal(masks[0], mask) for mask in masks[1:])  # also where omega is shared
        assert 0.5 < torch.stack(masks).float().mean() < 0.9
    model.eval()
    assert torch.equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize("ablation", ["mean", "softmax"])
def test_ablations(ablation: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(ablation=ablation))
    bert.add_adapter_fusion(FUSE, config="scalearn", name="by_hand")
    randomise_omegas(bert)
    for omega, target in zip(omegas(bert), omegas(bert, "by_hand"), strict=True):
        target.data.copy_(omega / omega.sum(0) if ablation == "mean" else omega.exp() / omega.exp().sum(0))
    expected = output(bert, batch, Fuse(*NAMES, name="by_hand"))
    torch.testing.assert_close(output(bert, batch, FUSE), expected, atol=1e-5, rtol=1e-5)


def test_fixed_coefficients(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(fixed={"c": 0.9, "a": 0.1, "b": 0.5}))
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(fixed=[0.1, 0.5, 0.9]), name="listed")
    bert.add_adapter_fusion(FUSE, config="scalearn", name="free")
    fill(bert, [0.1, 0.5, 0.9], "free")
    expected = output(bert, batch, Fuse(*NAMES, name="free"))
    for name in ("a,b,c", "listed"):
        bert.train_adapter_fusion(Fuse(*NAMES, name=name))
        assert not any(p.requires_grad for p in bert.parameters())
        bert.eval()
        torch.testing.assert_close(output(bert, batch, Fuse(*NAMES, name=name)), expected, atol=2e-6, rtol=1e-5)


# Training


def classifier(**changes: Any) -> Any:
    torch.manual_seed(4)
    model = BertForSequenceClassification(tiny_config(num_labels=2, **changes))
    adapters.init(model)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_changes_coefficients_and_head_alone(variant: str, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(4)
    model = AutoAdapterModel.from_config(tiny_config())
    with_sources(model, "mixture")
    model.add_classification_head("target", num_labels=2)
    model.add_classification_head("a", num_labels=2)
    model.add_adapter_fusion(FUSE, config=variant)
    model.train_adapter_fusion(FUSE)
    model.active_head = "target"
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {
        n
        for n in before
        if "adapter_fusion_layer.a,b,c." in n or (n.startswith("heads.target.") and "position" not in n)
    }


def test_unfreezing_the_adapters_trains_them_too(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config="scalearn")
    bert.train_adapter_fusion(FUSE, unfreeze_adapters=True)
    bert(**batch).last_hidden_state.square().sum().backward()
    trained = {n for n, p in bert.named_parameters() if p.requires_grad}
    assert trained == {n for n in bert.state_dict() if ".adapters." in n or "adapter_fusion_layer" in n}
    assert all(p.grad is not None for p in bert.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", ["scalearn", "scalearn_pp"])
def test_checkpointed_gradients(variant: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "mixture")
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(variant=variant, omega_dropout=0.0))
    bert.train_adapter_fusion(FUSE)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            bert.gradient_checkpointing_enable()
        bert.zero_grad()
        torch.manual_seed(2)
        bert(**batch).last_hidden_state.square().sum().backward()
        grads.append([o.grad.clone() for o in omegas(bert)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["seq_bn", "functions"])
def test_compiled_without_graph_breaks(kind: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, kind)
    bert.add_adapter_fusion(FUSE, config="scalearn_pp")
    bert.train_adapter_fusion(FUSE)
    bert.eval()
    value = bert(**batch).last_hidden_state
    value.square().sum().backward()
    (omega,) = omegas(bert)
    gradient, omega.grad = omega.grad, None
    compiled = torch.compile(bert, fullgraph=True, backend="eager")
    found = compiled(**batch).last_hidden_state
    found.square().sum().backward()
    torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(omega.grad, gradient, atol=1e-3, rtol=1e-4)


def test_half_precision_base(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config="scalearn")
    exact = output(bert, batch, FUSE)
    bert.bfloat16()
    assert (output(bert, batch).float() - exact).abs().max() < 0.2
    bert.float()
    for omega in omegas(bert):
        omega.data = omega.data.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = bert(**batch).last_hidden_state
        result.float().sum().backward()
    assert (result.float() - exact).abs().max() < 0.3
    assert all(o.grad is not None and o.grad.dtype == torch.float32 for o in omegas(bert))


# The penalty


def penalty_by_hand(model: nn.Module, weight: float) -> Tensor:
    return sum(weight * ((1 - o.mean(1)) ** 2).sum() / len(NAMES) for o in omegas(model))  # type: ignore[return-value]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_penalty_is_in_the_loss(variant: str, batch: dict[str, Tensor]) -> None:
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with_sources(model, "double_seq_bn")
    labels = torch.tensor([0, 1, 1, 0])
    grads, losses = [], []
    for weight in (0.0, 0.5):
        torch.manual_seed(1)
        model.add_adapter_fusion(
            FUSE, config=ScaLearnConfig(variant=variant, regularization=weight, omega_dropout=0.0), overwrite_ok=True
        )
        model.train_adapter_fusion(FUSE)
        result = model(**batch, labels=labels)
        result.loss.backward()
        losses.append(result.loss.detach())
        grads.append([o.grad.clone() for o in omegas(model)])
        tuples = model(**batch, labels=labels, return_dict=False)
        assert torch.equal(tuples[0], result.loss)
    extra = penalty_by_hand(model, 0.5)
    torch.testing.assert_close(losses[1], losses[0] + extra.detach())
    expected = torch.autograd.grad(extra, omegas(model))
    for with_it, without, own in zip(grads[1], grads[0], expected, strict=True):
        torch.testing.assert_close(with_it, without + own, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(pal_adapters.fusion_regularization(model), extra)
    model.eval()
    assert torch.equal(model(**batch, labels=labels).loss.detach(), losses[0])  # measures the task alone


def test_loss_scaling_applies_to_the_penalty(batch: dict[str, Tensor]) -> None:
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with_sources(model, "seq_bn")
    model.add_adapter_fusion(FUSE, config=ScaLearnConfig(regularization=0.5, omega_dropout=0.0))
    model.train_adapter_fusion(FUSE)
    grads = []
    for scale in (1.0, 65536.0):
        model.zero_grad()
        (model(**batch, labels=torch.tensor([0, 1, 1, 0])).loss * scale).backward()
        grads.append([o.grad / scale for o in omegas(model)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


class Gradients(TrainerCallback):
    """Keeps the coefficients' gradients of the first step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = [omega.grad.clone() for omega in omegas(kwargs["model"])]


# What a step over 2 batches gives: the mean over all rows or tokens, or, where the model takes the number of items and
# does not use it, the sum of the batches' means.
@pytest.mark.parametrize(("kind", "times"), [("classifier", 1), ("llama", 1), ("flex head", 2)])
def test_accumulated_gradients_hold_the_penalty_as_they_hold_the_loss(
    kind: str, times: int, base_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    torch.manual_seed(5)
    still: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if kind == "classifier":
        model = classifier(**still)
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
            )
        )
        adapters.init(model)
    else:
        model = AutoAdapterModel.from_pretrained(base_path, **still)
        model.add_classification_head("h", num_labels=2)
    with_sources(model, "seq_bn")
    ids = torch.randint(1, 40, (4, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[2:, :3] = -100  # batches with different numbers of tokens
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": own if kind == "llama" else i % 2}
        for i, (row, own) in enumerate(zip(ids, labels, strict=True))
    ]
    found = {}
    for weight in (0.0, 0.5):
        config = ScaLearnConfig(variant="scalearn_uniform", regularization=weight, omega_dropout=0.0, init_std=0.0)
        model.add_adapter_fusion(FUSE, config=config, overwrite_ok=True)
        model.train_adapter_fusion(FUSE)
        keep = Gradients()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_grad_norm=0.0, learning_rate=0.0, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            dataloader_pin_memory=False, remove_unused_columns=False, logging_strategy="no",
        )  # fmt: skip
        AdapterTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[keep]).train()
        found[weight] = keep.found
    expected = torch.autograd.grad(penalty_by_hand(model, 0.5), omegas(model))
    for with_it, without, own in zip(found[0.5], found[0.0], expected, strict=True):
        torch.testing.assert_close(with_it - without, times * own, atol=1e-5, rtol=1e-3)


def test_a_penalty_is_not_lost_silently(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(regularization=0.5))
    bert.train_adapter_fusion(FUSE)
    with pytest.warns(UserWarning, match=r"fusion_regularization\(model\)"):
        bert(**batch)
    bert.eval()
    bert(**batch)
    bert.train()
    bert.set_active_adapters("a")
    bert(**batch)
    assert pal_adapters.fusion_regularization(bert) == 0


def test_the_penalty_of_several_models_is_added_once(batch: dict[str, Tensor]) -> None:
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with_sources(model, "seq_bn")
    for name in ("one", "two"):  # watches the loss twice
        model.add_adapter_fusion(
            FUSE, config=ScaLearnConfig(regularization=0.5, init_scale=6.0, omega_dropout=0.0), name=name
        )
    model.train_adapter_fusion(Fuse(*NAMES, name="one"))
    labels = torch.tensor([0, 1, 1, 0])
    loss = model(**batch, labels=labels).loss
    model.eval()
    plain = model(**batch, labels=labels).loss
    expected = sum(0.5 * ((1 - o.mean(1)) ** 2).sum() / 3 for o in omegas(model, "one"))
    torch.testing.assert_close(loss - plain, expected, atol=1e-5, rtol=1e-5)


# Compositions


def test_a_fusion_that_is_not_on_the_model(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config="scalearn", name="rte")
    with pytest.raises(UnknownAdapterError, match=r"Fuse\[a, b, c\] has no fusion.*'rte'.*name="):
        output(bert, batch, FUSE)


@pytest.mark.parametrize("kind", ["seq_bn", "mixture"])
def test_a_source_that_was_deleted(kind: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, kind)
    bert.add_adapter_fusion(FUSE, config="scalearn", set_active=True)
    bert.delete_adapter("b")
    with pytest.raises(UnknownAdapterError, match="'b', which is no longer on the model"):
        output(bert, batch)


def test_stack_in_front_of_a_fusion(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter("language", config=config_of("seq_bn"))
    randomise(bert, "language")
    bert.add_adapter_fusion(FUSE, config="scalearn")
    for index, name in enumerate(NAMES):
        fill(bert, [float(i == index) for i in range(3)])
        expected = output(bert, batch, Stack("language", name))
        torch.testing.assert_close(output(bert, batch, Stack("language", FUSE)), expected, atol=2e-6, rtol=1e-5)


def test_a_stack_as_a_source_counts_as_a_whole(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(Fuse("b", "c"), config="scalearn")
    fill(bert, [1.0, 0.0], "b,c")
    expected = output(bert, batch, Stack("a", "b"))
    torch.testing.assert_close(output(bert, batch, Fuse(Stack("a", "b"), "c")), expected, atol=1e-5, rtol=1e-5)


def test_several_fusions_on_one_model(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    setups = [Fuse("a", "b"), FUSE, Fuse("c", "b"), Fuse("a", "c")]
    for setup, config in zip(setups, ["scalearn", "scalearn_pp", "dynamic", "scalearn_uniform_pp"], strict=True):
        bert.add_adapter_fusion(setup, config=config)
    outputs = [output(bert, batch, setup) for setup in setups]
    for index, setup in enumerate(setups):
        assert torch.equal(output(bert, batch, setup), outputs[index])
        assert not any(torch.allclose(outputs[index], other) for i, other in enumerate(outputs) if i != index)
    bert.delete_adapter_fusion(Fuse("a", "b"))
    assert not [n for n in bert.state_dict() if "adapter_fusion_layer.a,b." in n]
    assert torch.equal(output(bert, batch, FUSE), outputs[1])
    for setup in setups[1:]:
        bert.delete_adapter_fusion(setup)
    assert not [n for n in bert.state_dict() if "adapter_fusion_layer" in n]


def test_the_hosts_own_fusion_is_what_it_was(
    bert: nn.Module, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.methods.bottleneck import BottleneckLayer
    from adapters.methods.modeling import BertFusion

    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config="dynamic")
    assert all(isinstance(layer, BertFusion) for layer in layers_of(bert))
    expected = output(bert, batch, FUSE)
    for name in ("compose_fuse", "add_fusion_layer"):
        original = getattr(BottleneckLayer, name)._pal_adapters_original
        monkeypatch.setattr(BottleneckLayer, name, original)
    assert torch.equal(output(bert, batch, FUSE), expected)


# Model classes

MODELS = ("albert", "bart", "distilbert", "encoder-decoder", "gpt2", "llama", "phi", "roberta", "t5", "vit")


@pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["seq_bn", "double_seq_bn"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(name: str, kind: str) -> None:
    model = classes.plain(name)
    classes.init(model)
    names = ("a", "b")
    for index, source in enumerate(names):
        model.add_adapter(source, config=config_of(kind))
        randomise(model, source, std=0.1 + 0.1 * index)
    fuse, inputs = Fuse(*names), classes.inputs(name)
    config = ScaLearnConfig(variant="scalearn_pp", init_std=0.3)
    model.add_adapter_fusion(fuse, config=config)
    (omega,) = omegas(model, "a,b")
    model.eval()

    def run(setup: Any) -> Tensor:
        model.set_active_adapters(setup)
        with torch.no_grad():
            result = model(**inputs)
        return result.last_hidden_state if "last_hidden_state" in result else result.logits

    learned = run(fuse)
    pal_adapters.fold(model, fuse, name="folded")
    torch.testing.assert_close(run("folded"), learned, atol=2e-5, rtol=1e-4)
    for index, source in enumerate(names):
        with torch.no_grad():
            omega.copy_(torch.eye(2)[index][:, None].expand_as(omega))
        torch.testing.assert_close(run(fuse), run(source), atol=1e-5, rtol=1e-4)
        assert (run(source) - run(None)).abs().max() > 1e-3
    with torch.no_grad():
        omega.zero_()
    assert torch.equal(run(fuse), run(None))


# Bad input


def state_of(model: nn.Module) -> tuple[Any, ...]:
    known = model.adapters_config
    return list(model.state_dict()), dict(known.fusions), dict(known.fusion_name_map), str(known.active_setup)


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "unknown source": (Fuse("a", "nobody"), "scalearn", UnknownAdapterError, "'nobody'.*a, b, c"),
    "empty": ([], "scalearn", ConfigError, "at least one source"),
    "twice": (Fuse("a", "b", "a"), "scalearn_pp", ConfigError, "'a' is named twice"),
    "lora": (Fuse("a", "lora"), "scalearn", UnsupportedError, "'lora'.*cannot be a source"),
    "prefix": (Fuse("prefix", "a"), "scalearn", UnsupportedError, "'prefix'.*cannot be a source"),
    "union": (Fuse("union", "a"), "scalearn", UnsupportedError, "'union'"),
    "lhuc": (Fuse("a", "lhuc"), "scalearn", UnsupportedError, "lhuc"),
    "invertible": (Fuse("a", "inv"), "scalearn", UnsupportedError, r"'inv'.*Stack\('inv'"),
    "residuals": (Fuse("a", "post"), "scalearn", UnsupportedError, "residual_before_ln"),
    "places": (Fuse("a", "two_places"), "scalearn", ValueError, "mh_adapter"),
    "fixed names": (FUSE, {"fixed": {"a": 1.0}}, ConfigError, "fixed="),
    "fixed number": (FUSE, {"fixed": [1.0, 2.0]}, ConfigError, "fixed="),
    "existing": (Fuse("a", "b"), "scalearn", ConfigError, "overwrite_ok"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_leave_the_model_as_it_was(case: str, bert: nn.Module) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter("lora", config="lora")
    bert.add_adapter("prefix", config="prefix_tuning")
    bert.add_adapter("union", config=adapters.ConfigUnion(config_of("seq_bn"), adapters.LoRAConfig()))
    bert.add_adapter("lhuc", config="lhuc")
    bert.add_adapter("inv", config="seq_bn_inv")
    bert.add_adapter("post", config=config_of("seq_bn[residual_before_ln=False]"))
    bert.add_adapter("two_places", config="double_seq_bn")
    bert.add_adapter_fusion(Fuse("a", "b"), config="scalearn")
    before = state_of(bert)
    names, config, error, message = BAD[case]
    if isinstance(config, dict):
        config = ScaLearnConfig(**config)
    with pytest.raises(error, match=message):
        bert.add_adapter_fusion(names, config=config, set_active=True)
    assert state_of(bert) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "scalern"}, "variant='scalern'.*scalearn_pp"),
        ({"omega_dropout": 1.0}, "omega_dropout=1.0"),
        ({"init_std": -1.0}, "init_std"),
        ({"ablation": "max"}, "ablation='max'"),
        ({"regularization": -0.1}, "regularization=-0.1"),
        ({"regularization_form": "sum"}, "regularization_form='sum'"),
        ({"regularization_form": "code"}, "no effect"),
        ({"regularization_form": "code", "regularization": 0.1}, "no effect"),
        ({"value": True}, "value=True.*does not use it"),
        ({"dropout_prob": 0.1}, "dropout_prob=0.1"),
        ({"fixed": {}}, "fixed="),
        ({"fixed": ["a"]}, "fixed="),
        ({"fixed": [1.0], "init_scale": 1.0}, "init_scale=1.0 has no effect"),
        ({"fixed": [1.0], "regularization": 1.0}, "regularization=1.0 has no effect"),
        ({"fixed": [1.0], "omega_dropout": 0.3}, "omega_dropout=0.3"),
        ({"fixed": [1.0], "variant": "scalearn_pp"}, "variant='scalearn_pp' has no effect"),
    ],
)
def test_bad_configs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScaLearnConfig(**values)
    with pytest.raises(ConfigError, match=message):
        ScaLearnConfig.from_dict({"architecture": "scalearn", **values})


def test_misspelt_argument() -> None:
    with pytest.raises(ConfigError, match=r"omega_droput=0.1 is not an argument"):
        ScaLearnConfig.from_dict({"architecture": "scalearn", "omega_droput": 0.1})


def test_stacks_of_two_kinds_are_rejected(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "par_bn")
    bert.add_adapter("s", config=config_of("seq_bn"))
    bert.add_adapter_fusion(FUSE, config="scalearn")
    with pytest.raises(UnsupportedError, match="one kind"):
        output(bert, batch, Stack("s", FUSE))
