"""Activation checkpointing: the same values and the same gradients, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import get_peft_model

from tests import zoo
from tests.methods import makers
from tests.zoo import ALBERT, BY_NAME, Host

pytestmark = [
    *zoo.HOST_WARNINGS,
    # The host's dropout is on: torch's checkpoint keeps the random numbers of devices that are not there.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]
CONFIGS = makers("peft")
# Terms inside the block: bert, t5, llama, gemma2; behind it: mbart, whisper, opt, granite, and vit in transformers 5;
# in front of its last norm: bart.
INSIDE = ["bert", "t5", "gpt2", "llama", "gemma2", "bart", "clip"]
BEHIND = ["mbart", "whisper", "vit", "opt", "granite"]
modes = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def is_added(name: str) -> bool:
    return any(part in name for part in ("_units.", "_shared.", "_norms."))


def adapt(host: Host, method: str, adapters: tuple[str, ...] = ("default",), **more: Any) -> Any:
    model = get_peft_model(host.build(), CONFIGS[method](**more), adapter_name=adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, CONFIGS[method](**more))
    for name, parameter in model.named_parameters():
        if is_added(name):
            zoo.randomise(nn.ParameterList([parameter]), std=0.3, seed=len(name))
    return model.train()


def loss(model: nn.Module, inputs: dict[str, Tensor], seed: int, **more: Any) -> Tensor:
    """With dropout on, in the host and in the module."""
    torch.manual_seed(seed)
    values = zoo.outputs_of(model(**inputs, **more))
    return sum((v * torch.linspace(0, 1, v.numel()).view(v.shape)).sum() for v in values.values())  # type: ignore[return-value]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def prepare(model: Any) -> None:
    """Both runs with the same kernels, and embeddings that are trained, since reentrant checkpoints need inputs with a
    gradient (`enable_input_require_grads` reaches one embedding, these models have one a stack).
    """
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("embed", "conv", "shared", "wte", "wpe")):
            parameter.requires_grad_(True)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False


def check(
    model: Any, inputs: dict[str, Tensor], *, reentrant: bool, passes: int = 1, rounding: bool = False, **more: Any
) -> None:
    """`passes` forward passes with other dropout each, then one backward pass for all."""
    prepare(model)
    plain = [loss(model, inputs, seed, **more) for seed in range(passes)]
    sum(plain).backward()  # type: ignore[union-attr]
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    values = [loss(model, inputs, seed, **more) for seed in range(passes)]
    sum(values).backward()  # type: ignore[union-attr]
    actual = gradients(model)
    assert [v.item() for v in values] == [v.item() for v in plain]
    assert sum(is_added(n) for n in expected)
    assert actual.keys() == expected.keys()
    assert any(g.abs().max() > 1e-4 for n, g in expected.items() if is_added(n))
    if rounding:
        assert max(zoo.difference(actual[n], g) / (1 + float(g.abs().max())) for n, g in expected.items()) < 1e-5
    else:
        assert not [n for n, g in expected.items() if not torch.equal(actual[n], g)]


@modes
@pytest.mark.parametrize("name", INSIDE + BEHIND)
@pytest.mark.parametrize("method", CONFIGS)
def test_values_and_gradients(name: str, method: str, reentrant: bool) -> None:
    host = BY_NAME[name]
    model = adapt(host, method)
    inputs = host.inputs()
    if name == "whisper" and not zoo.V5 and reentrant:
        # transformers 4.57 passes the encoder's states by name: reentrant checkpoints cannot go back through them.
        with torch.no_grad():
            inputs["encoder_outputs"] = (
                model.get_base_model().encoder(inputs.pop("input_features")).last_hidden_state,
            )
    # The encoder's gradient is a sum over the decoder's blocks, which reentrant checkpoints add up in another order.
    check(model, inputs, reentrant=reentrant, rounding=reentrant and len(host.stacks) == 2 and name != "clip")


@modes
@pytest.mark.parametrize("name", ["bert", "mbart", "llama"])
@pytest.mark.parametrize("method", ["pal", "houlsby_pal", "top_attention"])
def test_two_forward_passes_before_one_backward_pass(name: str, method: str, reentrant: bool) -> None:
    host = BY_NAME[name]
    check(adapt(host, method), host.inputs(), reentrant=reentrant, passes=2, rounding=reentrant and name == "mbart")


@modes
@pytest.mark.parametrize("method", ["pal", "low_rank", "lhuc", "parallel_houlsby"])
def test_one_block_at_every_depth(method: str, reentrant: bool) -> None:
    """ALBERT has no checkpointing; torch's, around the group that runs three times, gives the same gradients."""
    from torch.utils.checkpoint import checkpoint as run_again

    model, inputs = adapt(ALBERT, method), ALBERT.inputs()
    model.get_base_model().embeddings.requires_grad_(True)
    plain = loss(model, inputs, 0)
    plain.backward()
    expected = gradients(model)
    group = model.get_base_model().encoder.albert_layer_groups[0]
    inner = group.forward

    def again(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run_again(lambda s: inner(s, *args, **kwargs), states, use_reentrant=reentrant)

    group.forward = again
    value = loss(model, inputs, 0)
    value.backward()
    actual = gradients(model)
    assert value.item() == plain.item()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[n], g) for n, g in expected.items())


@modes
@pytest.mark.parametrize("name", ["bert", "mbart", "gpt2"])
@pytest.mark.parametrize("method", ["pal", "parallel_houlsby"])
def test_one_adapter_a_row(name: str, method: str, reentrant: bool) -> None:
    model = adapt(BY_NAME[name], method, ("rte", "sst"))
    model.base_model.set_adapter(["rte", "sst"])
    rounding = reentrant and name == "mbart"
    names = ["sst", "__base__", "rte"]
    check(model, BY_NAME[name].inputs(), reentrant=reentrant, rounding=rounding, adapter_names=names)


@modes
def test_base_trained_as_well(reentrant: bool) -> None:
    model = adapt(BY_NAME["bert"], "pal", train_base=True)
    assert all(p.requires_grad for p in model.parameters())
    check(model, BY_NAME["bert"].inputs(), reentrant=reentrant)
