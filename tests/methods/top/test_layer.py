"""Modules on top of the last block, against plain computations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pal_adapters.hooks.masks import CallMask
from pal_adapters.methods.top.layer import TopAttention, TopBertLayer
from pal_adapters.nn.unit import TaskUnit, UnitInputs
from tests import zoo

D, R = 12, 8


def run(unit: TaskUnit, y: Tensor, keep: Tensor | None = None) -> Tensor:
    mask = CallMask(keep, None, False, torch.device("cpu"))
    return unit("stack_output", y, UnitInputs(mask=mask, batch=y.shape[0]), unit.weights())


@pytest.fixture(params=[(2, 4), (1, 1), (3, 1)])
def states(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    b, n = request.param
    keep = torch.rand(b, 1, n, n) > 0.4
    keep[..., 0] = True
    return torch.randn(b, n, D), keep


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 4), (6, 2)])
def test_top_attention(layers: int, heads: int, states: tuple[Tensor, Tensor]) -> None:
    unit = TopAttention(D, R, num_layers=layers, num_heads=heads).eval()
    zoo.randomise(unit)
    y, keep = states
    expected = zoo.top_attention(y, unit.weights(), keep, layers=layers, heads=heads)
    assert zoo.difference(run(unit, y, keep), expected) < 1e-5
    assert zoo.difference(expected, y) > 1e-2


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_top_bert_layer(heads: int, states: tuple[Tensor, Tensor]) -> None:
    unit = TopBertLayer(D, 20, num_heads=heads).eval()
    zoo.randomise(unit)
    y, keep = states
    assert zoo.difference(run(unit, y, keep), zoo.top_bert_layer(y, unit.weights(), keep, heads=heads)) < 1e-5


def test_gradients() -> None:
    y, keep = torch.randn(2, 3, D, requires_grad=True), torch.ones(2, 1, 3, 3, dtype=torch.bool)
    for unit in (TopAttention(D, R, num_layers=2, num_heads=2).eval(), TopBertLayer(D, 20, num_heads=3).eval()):
        zoo.randomise(unit)
        weights = unit.weights()
        if isinstance(unit, TopAttention):
            expected = zoo.top_attention(y, weights, keep, layers=2, heads=2)
        else:
            expected = zoo.top_bert_layer(y, weights, keep, heads=3)
        wanted = [y, *weights.values()]
        for a, b in zip(
            *(torch.autograd.grad(t.sin().sum(), wanted) for t in (run(unit, y, keep), expected)), strict=True
        ):
            assert zoo.difference(a, b) < 1e-4


def test_there_is_no_residual_and_no_activation() -> None:
    """With the last norm at zero only the decoder's bias is left, whatever `y` is."""
    unit = TopAttention(D, R, num_layers=1, num_heads=2).eval()
    zoo.randomise(unit)
    with torch.no_grad():
        unit.layers[0].LayerNorm.weight.zero_()  # type: ignore[union-attr,operator]
        unit.layers[0].LayerNorm.bias.zero_()  # type: ignore[union-attr,operator]
    assert zoo.difference(run(unit, torch.randn(2, 3, D)), unit.decoder.bias.expand(2, 3, D)) == 0


@pytest.mark.parametrize("kind", ["attention", "bert"])
def test_dropout_in_training_alone(kind: str) -> None:
    make = {
        "attention": lambda: TopAttention(D, R, num_layers=2, num_heads=2, dropout=0.5),
        "bert": lambda: TopBertLayer(D, 20, num_heads=2, dropout=0.5),
    }[kind]
    unit, y = make(), torch.randn(2, 3, D)
    zoo.randomise(unit)
    unit.eval()
    assert torch.equal(run(unit, y), run(unit, y))
    unit.train()
    assert not torch.equal(run(unit, y), run(unit, y))


@pytest.mark.parametrize("legacy", [False, True])
def test_initialisation(legacy: bool) -> None:
    """The authors' code draws the norms too, gain and bias alike, from N(0, 0.02^2)."""
    top = TopAttention(D, 600, num_heads=2, legacy_ln_init=legacy)
    bert = TopBertLayer(600, 20, num_heads=2, legacy_ln_init=legacy)
    for unit, norms in (
        (top, [layer.LayerNorm for layer in top.layers]),
        (bert, [bert.attention.LayerNorm, bert.LayerNorm]),
    ):
        unit.reset_parameters(identity=False)
        for norm in norms:
            assert isinstance(norm, torch.nn.LayerNorm)
            if legacy:
                assert abs(norm.weight.std().item() - 0.02) < 5e-3
                assert abs(norm.weight.mean().item()) < 5e-3
                assert norm.bias.any()
            else:
                assert (norm.weight == 1).all()
                assert not norm.bias.any()
    assert abs(top.layers[0].dense.weight.std().item() - 0.02) < 1e-3  # type: ignore[union-attr,operator]
    top.to("meta").reset_parameters(identity=False)
    bert.to("meta").reset_parameters(identity=False)


def test_parameters() -> None:
    counts = {
        TopAttention(768, 204): 1_320_444, TopAttention(1024, 204): 1_425_148,
        TopBertLayer(768, 3072): 7_087_872, TopBertLayer(1024, 4096): 12_596_224,
    }  # fmt: skip
    for unit, expected in counts.items():
        assert sum(p.numel() for p in unit.parameters()) == expected
