"""What hooks keep, what they leave behind, in which dtype they compute, and what a copy of a model does."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import get_peft_model

from pal_adapters import (
    UnsupportedError,
)
from pal_adapters.blocks.norms import final_norm
from pal_adapters.blocks.sites import find_blocks
from pal_adapters.hooks.attachment import Attachment
from pal_adapters.nn.unit import UnitInputs
from tests import zoo
from tests.methods import RECORDS, makers
from tests.zoo import BY_NAME, Host

pytestmark = zoo.HOST_WARNINGS
CONFIGS = makers("peft", dropout=False)
# A term inside the block, behind the block and in front of its last norm.
NAMES = ["bert", "gpt2", "mbart", "bart", "opt", "vit", "clip"]


def is_added(name: str) -> bool:
    return any(part in name for part in ("_units.", "_shared.", "_norms."))


def adapt(host: Host, method: str, model: nn.Module | None = None, **more: Any) -> Any:
    adapted = get_peft_model(host.build() if model is None else model, CONFIGS[method](**more)).eval()
    for name, parameter in adapted.named_parameters():
        if is_added(name):
            zoo.randomise(nn.ParameterList([parameter]), std=0.3, seed=len(name))
    return adapted


def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return zoo.outputs_of(model(**inputs))


# Dtypes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.12), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "gemma3", "mbart"])
@pytest.mark.parametrize("method", CONFIGS)
def test_narrow_base(name: str, method: str, dtype: torch.dtype, tolerance: float) -> None:
    """A narrow base with an adapter in float32, and with one in its own dtype, stays close to float32 all through."""
    host = BY_NAME[name]
    inputs = host.inputs()
    full = adapt(host, method)
    expected = run(full, inputs)
    unadapted = run(host.build(), inputs)
    narrow = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    for adapter_dtype in (torch.float32, dtype):
        model = copy.deepcopy(full)
        for parameter_name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(adapter_dtype if is_added(parameter_name) else dtype)
        actual = run(model, narrow)
        for key, value in actual.items():
            assert value.dtype == dtype
            real = host.real(inputs, key)
            effect = zoo.difference(unadapted[key], expected[key], real)
            assert zoo.difference(value, expected[key], real) < min(tolerance, effect / 2)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("method", CONFIGS)
def test_autocast(name: str, method: str) -> None:
    host = BY_NAME[name]
    inputs, model = host.inputs(), adapt(host, method)
    expected = run(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = zoo.outputs_of(host.build()(**inputs))
        value = zoo.outputs_of(model(**inputs))
        loss = sum(v.float().pow(2).mean() for v in value.values())
    loss.backward()  # type: ignore[union-attr]
    for key, actual in value.items():
        assert actual.dtype == plain[key].dtype
        assert zoo.difference(actual, expected[key], host.real(inputs, key)) < 0.12
    gradients = {n: p.grad for n, p in model.named_parameters() if is_added(n) and p.requires_grad}
    assert all(g is not None and g.isfinite().all() and g.dtype == torch.float32 for g in gradients.values())


def test_autocast_with_one_adapter_a_row() -> None:
    host = BY_NAME["bert"]
    model = get_peft_model(host.build(), CONFIGS["pal"](), adapter_name="rte")
    model.add_adapter("sst", CONFIGS["pal"]())
    model.eval()
    zoo.randomise(nn.ParameterList([p for n, p in model.named_parameters() if is_added(n)]), std=0.3)
    inputs, names = host.inputs(), ["rte", "sst", "rte"]
    with torch.no_grad():
        expected = model(**inputs, adapter_names=names).last_hidden_state
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(**inputs, adapter_names=names).last_hidden_state
    assert zoo.difference(actual, expected, host.real(inputs)) < 0.12


# What is left behind


def attachments(model: nn.Module) -> list[Attachment]:
    found = [getattr(module, "attachment", None) for module in model.modules()]
    return [a for a in found if isinstance(a, Attachment)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [m for m in CONFIGS if m != "houlsby"])
@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_of_a_forward_pass_is_kept(name: str, method: str, enabled: bool) -> None:
    host = BY_NAME[name]
    model, kept = adapt(host, method), []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        kept.append(weakref.ref(value))

    for stack in host.stacks:
        for block in zoo.blocks_of(model.get_base_model(), stack):
            block.register_forward_hook(watch)
    if enabled:
        model(**host.inputs())
    else:
        with model.disable_adapter():
            model(**host.inputs())
    gc.collect()
    assert kept
    assert [ref() for ref in kept] == [None] * len(kept)
    for attachment in attachments(model):
        assert not [name for name, value in vars(attachment).items() if isinstance(value, Tensor)]
        assert attachment._held.value is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", CONFIGS)
def test_unload_leaves_nothing(name: str, method: str) -> None:
    host = BY_NAME[name]
    plain, inputs = host.build().requires_grad_(False), host.inputs()
    before = run(plain, inputs)
    base = adapt(host, method).unload()
    assert {n: type(m) for n, m in base.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    for a, b in zip(base.modules(), plain.modules(), strict=True):
        assert len(a._forward_hooks) == len(b._forward_hooks)
        assert len(a._forward_pre_hooks) == len(b._forward_pre_hooks)
        assert vars(a).keys() == vars(b).keys()
    for key, value in run(base, inputs).items():
        assert torch.equal(value, before[key])


def test_forward_of_somebody_else_stays() -> None:
    """accelerate, and we in transformers 4.57, put a function in the place of a block's `forward`."""
    model = BY_NAME["mbart"].build()
    block = model.encoder.layers[0]
    inner, calls = block.forward, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    block.forward = counting
    adapted = adapt(BY_NAME["mbart"], "pal", model)
    run(adapted, BY_NAME["mbart"].inputs())
    assert calls == [1]
    base = adapted.unload()
    assert base.encoder.layers[0].forward is counting
    assert "forward" not in vars(base.encoder.layers[1])


# Copies


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "deepcopy") for name in NAMES), ("bert", "pickle"), ("gpt2", "pickle"), ("mbart", "pickle")],
)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_copy_is_independent(name: str, method: str, how: str) -> None:
    host = BY_NAME[name]
    inputs, model = host.inputs(), adapt(host, method)
    expected = run(model, inputs)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    for key, value in run(twin, inputs).items():
        assert torch.equal(value, expected[key])
    with torch.no_grad():  # the copy's hooks read the copy's weights
        for parameter_name, parameter in twin.named_parameters():
            if is_added(parameter_name):
                parameter.add_(0.5)
    changed = run(twin, inputs)
    for key, value in run(model, inputs).items():
        assert torch.equal(value, expected[key])
        assert zoo.difference(changed[key], value, host.real(inputs, key)) > 1e-3
    with model.disable_adapter():
        assert zoo.difference(run(model, inputs)[key], expected[key]) > 1e-3
        assert torch.equal(run(twin, inputs)[key], changed[key])
    names = {n for n, _ in model.named_parameters()}
    assert {n for n, _ in twin.named_parameters()} == names
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}


def test_a_copy_keeps_weights_shared_over_blocks() -> None:
    twin = copy.deepcopy(adapt(BY_NAME["bert"], "pal"))
    first, second = (b.pal.units["default"].weights()["encoder.weight"] for b in twin.base_model.model.encoder.layer)
    assert first is second
    assert first is twin.base_model.model.encoder.layer[0].pal.shared["default"].encoder.weight


# Order and forms of values


class Runner:
    """Runs a function at each site and remembers the order."""

    def __init__(self, **functions: Any) -> None:
        self.functions = functions
        self.order: list[str] = []

    def is_active(self, site: str) -> bool:
        return site in self.functions

    def keeps_inputs(self) -> bool:
        return False

    def run(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        self.order.append(site)
        return self.functions[site](value)


@pytest.mark.parametrize("name", ["bert", "gpt2", "mbart", "vit", "clip", "t5"])
def test_sites_at_one_module_come_in_the_order_of_the_block(name: str) -> None:
    """`o2` is scaled before a term is added, whichever was asked for first."""
    host = BY_NAME[name]
    results = []
    for order in (("ffn", "residual", "output"), ("output", "residual", "ffn"), ("residual", "output", "ffn")):
        model = host.build()
        runner = Runner(ffn=lambda v: 0.5 * v, residual=lambda v: v + 3, output=lambda v: v - 1)
        for block in find_blocks(model):
            attachment = Attachment(model, block, runner)
            for site in order:
                attachment.require([site], ["mask"])
                attachment.require([site], ["mask"])  # again: no second hook
        results.append(run(model, host.inputs()))
        assert runner.order == ["ffn", "residual", "output"] * len(find_blocks(model))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])
        assert torch.equal(value, results[2][key])


def test_a_need_that_comes_later_is_captured() -> None:
    """A module that reads the raw input, then one that reads the normalised one, on one block."""
    for name in ("gpt2", "mbart"):
        host = BY_NAME[name]
        plain, inputs = host.build(), host.inputs()
        model = get_peft_model(host.build(), CONFIGS["low_rank"](pal_input="raw"), adapter_name="rte")
        model.add_adapter("sst", CONFIGS["low_rank"]())
        model.eval()
        zoo.randomise(nn.ParameterList([p for n, p in model.named_parameters() if is_added(n)]))
        for adapter, raw in (("rte", True), ("sst", False)):
            model.set_adapter(adapter)
            source = model.get_base_model()
            handles = []
            for stack in host.stacks:
                for i, (a, b) in enumerate(
                    zip(zoo.blocks_of(plain, stack), zoo.blocks_of(source, stack), strict=True)
                ):
                    weights = zoo.weights_of(b, "low_rank", adapter)
                    reference = RECORDS["low_rank"].make_reference(pal_input="raw" if raw else "norm")
                    handles += zoo.BlockByHand(host, stack, i, a, inputs).hooks(reference, weights)
            expected = run(plain, inputs)
            for handle in handles:
                handle.remove()
            for key, value in run(model, inputs).items():
                assert zoo.difference(value, expected[key], host.real(inputs, key)) < 5e-5


@pytest.mark.parametrize("method", [name for name in CONFIGS if not RECORDS[name].at_top])
def test_feed_forward_without_a_dimension_for_rows(method: str) -> None:
    """OPT runs its feed-forward part on the tokens of all rows in one dimension: rows keep their own units."""
    host = BY_NAME["opt"]
    model = get_peft_model(host.build(), CONFIGS[method](), adapter_name="rte")
    model.add_adapter("sst", CONFIGS[method]())
    model.eval()
    zoo.randomise(nn.ParameterList([p for n, p in model.named_parameters() if is_added(n)]), std=0.3)
    inputs, names = host.inputs(), ["sst", "__base__", "rte"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = {k: v[row : row + 1] for k, v in inputs.items()}
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(**alone).logits
            else:
                model.set_adapter(name)
                expected = model(**alone).logits
            assert zoo.difference(mixed[row : row + 1], expected, host.real(alone)) < 5e-5


@pytest.mark.parametrize("method", ["pal", "low_rank", "houlsby_pal"])
def test_chunked_feed_forward_is_refused(method: str) -> None:
    host = BY_NAME["bert"]
    model = adapt(host, method, host.build(chunk_size_feed_forward=3))
    with pytest.raises(UnsupportedError, match=r"3 of 9 tokens.*chunk_size_feed_forward=0"):
        run(model, host.inputs())


def test_chunked_feed_forward_is_fine_where_no_other_token_matters() -> None:
    host = BY_NAME["bert"]
    inputs = host.inputs()
    for method in ("lhuc", "parallel_houlsby", "houlsby"):
        a = run(adapt(host, method), inputs)["last_hidden_state"]
        b = run(adapt(host, method, host.build(chunk_size_feed_forward=3)), inputs)["last_hidden_state"]
        assert zoo.difference(a, b) < 1e-5


def test_hidden_states_without_a_dimension_for_rows_are_refused() -> None:
    """Flash attention may drop padding and with it the rows."""
    host = BY_NAME["bert"]
    model = adapt(host, "pal")
    block = model.get_base_model().encoder.layer[0]
    attachment = block.pal.attachment
    attachment._on_input(block.attention, (torch.randn(7, 24),), {})
    with pytest.raises(UnsupportedError, match=r"shape \[7, 24\].*attn_implementation"):
        attachment.write("residual", torch.randn(7, 24))


def test_final_norms() -> None:
    expected = {
        "gpt2": "transformer.ln_f", "llama": "model.norm", "t5": "encoder.final_layer_norm", "vit": "layernorm",
        "opt": "model.decoder.final_layer_norm",
        "gpt-neox": "gpt_neox.final_layer_norm", "phi": "model.final_layernorm",
        "esm": "encoder.emb_layer_norm_after", "modernbert": "final_norm", "mbart": "encoder.layer_norm",
        "whisper": "encoder.layer_norm", "olmo": "model.norm", "dinov2": "layernorm", "bloom": "transformer.ln_f",
        "wav2vec2-stable": "encoder.layer_norm", "xmod-pre": "encoder.LayerNorm",
    }  # fmt: skip
    for name, path in expected.items():
        model = BY_NAME[name].build()
        last = next(b for b in find_blocks(model) if b.last)
        assert final_norm(model, last) is model.get_submodule(path), name
    model = BY_NAME["clip"].build()
    text, vision = (b for b in find_blocks(model) if b.last)
    assert final_norm(model, text) is model.text_model.final_layer_norm
    assert final_norm(model, vision) is None
