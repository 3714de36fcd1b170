"""What the units have in common: their weights, and mixed batches, which equal one call a row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pal_adapters import UnsupportedError
from pal_adapters.hooks.masks import CallMask
from pal_adapters.hooks.rows import RowPlan, run_rows, run_unit, select_rows
from pal_adapters.methods.lhuc.layer import LHUC
from pal_adapters.methods.pal.layer import PAL
from pal_adapters.methods.top.layer import TopAttention
from pal_adapters.nn.bottleneck import Projections
from pal_adapters.nn.unit import TaskUnit, UnitInputs, init_linear, no_mask, stack_weights
from tests import zoo
from tests.methods import RECORDS
from tests.record import reset

D = 12  # the model's width


def pal(hidden_size: int = 8, **more: Any) -> PAL:
    unit = PAL(D, hidden_size, num_heads=2, **more)
    if more.get("tied", True):
        shared = Projections(D, hidden_size, bias=more.get("bias", True))
        zoo.randomise(shared, seed=hidden_size + 1)
        unit.share(shared)
        unit.source = (shared,)  # keeps it alive, and shows its gradients
    return unit


def _kinds() -> dict[str, tuple[Callable[[], TaskUnit], ...]]:
    """Units of every method by kind; those of one kind can be mixed in a batch."""
    kinds: dict[str, tuple[Callable[[], TaskUnit], ...]] = {}
    for name, record in RECORDS.items():
        if not record.method.network:
            changes = [{}, {}, *([record.wider] if record.wider else []), *record.variants]
            kinds[name] = tuple(functools.partial(record.unit, D, **change) for change in changes)
    kinds["different kinds"] = tuple(made[0] for made in list(kinds.values()) if "residual" in made[0]().sites)
    return kinds


KINDS = _kinds()


def identity_of(unit: TaskUnit) -> bool:
    """Whether a unit has an initialisation that leaves the value as it is."""
    return "stack_output" not in unit.sites


def units_of(kind: str) -> dict[str, TaskUnit]:
    units: dict[str, TaskUnit] = {}
    for number, make in enumerate(KINDS[kind]):
        units[f"task{number}"] = unit = make().eval()
        zoo.randomise(unit, seed=10 + number)
    return units


def inputs_of(b: int, n: int) -> UnitInputs:
    generator = torch.Generator().manual_seed(b * 100 + n)
    x, raw, h = (torch.randn(b, n, D, generator=generator).requires_grad_() for _ in range(3))
    padding = torch.rand(b, n, generator=generator) > 0.3
    padding[:, 0] = True
    return UnitInputs(x=x, raw=raw, h=h, mask=CallMask(padding, None, False, torch.device("cpu")), batch=b)


def tensors(units: dict[str, TaskUnit], inputs: UnitInputs, value: Tensor) -> list[Tensor]:
    weights = {id(t): t for unit in units.values() for t in unit.weights().values()}
    return [*weights.values(), inputs.x, inputs.raw, inputs.h, value]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_a_mixed_batch_equals_one_call_a_row(kind: str, data: st.DataObject) -> None:
    """Any order, repeated and absent tasks, rows without a task, units of different widths; gradients too."""
    units = units_of(kind)
    choice = st.sampled_from([*units, "__base__"])
    names = data.draw(st.lists(choice, min_size=1, max_size=7))
    n = data.draw(st.integers(1, 4))
    inputs = inputs_of(len(names), n)
    value = torch.randn(len(names), n, D, requires_grad=True)
    sites = sorted({site for unit in units.values() for site in unit.sites})
    for site in sites:
        mixed = run_rows(units, RowPlan(names, keep=data.draw(st.booleans())), site, value, inputs)
        rows = []
        for row, name in enumerate(names):
            if name not in units or site not in units[name].sites:
                rows.append(value[row])
                continue
            alone = select_rows(inputs, torch.tensor([row]))
            rows.append(run_unit(units[name], site, value[row : row + 1], alone)[0])
        expected = torch.stack(rows)
        assert mixed.dtype == value.dtype
        assert zoo.difference(mixed, expected) < 2e-5
        wanted = tensors(units, inputs, value)
        weight = torch.randn(expected.shape)
        a, b = (torch.autograd.grad((t * weight).sum(), wanted, allow_unused=True) for t in (mixed, expected))
        for first, second in zip(a, b, strict=True):
            if first is None or second is None:
                assert (
                    (0 if first is None else first.abs().max()) == (0 if second is None else second.abs().max()) == 0
                )
            else:
                assert zoo.difference(first, second) < 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_without_a_row_get_no_gradient(kind: str) -> None:
    units = units_of(kind)
    for unit in units.values():
        unit.requires_grad_(True)
    site = units["task1"].sites[-1]
    value = torch.randn(3, 2, D)
    run_rows(units, RowPlan(["task1"] * 3, keep=True), site, value, inputs_of(3, 2)).sum().backward()
    assert all(p.grad is None for p in units["task0"].parameters())
    assert any(p.grad is not None for p in units["task1"].parameters())


def test_one_task_for_all_rows_is_one_call_with_its_own_weights() -> None:
    units, inputs = units_of("pal"), inputs_of(4, 3)
    value = torch.randn(4, 3, D)
    together = run_rows(units, RowPlan(["task1"] * 4, keep=True), "residual", value, inputs)
    assert torch.equal(together, run_unit(units["task1"], "residual", value, inputs))


def test_rows_without_a_task_are_untouched() -> None:
    units, inputs, value = units_of("pal"), inputs_of(3, 2), torch.randn(3, 2, D)
    assert run_rows(units, RowPlan(["x", "y", "x"], keep=True), "residual", value, inputs) is value
    mixed = run_rows(units, RowPlan(["x", "task0", "x"], keep=True), "residual", value, inputs)
    assert torch.equal(mixed[[0, 2]], value[[0, 2]])
    assert run_rows(units, RowPlan(["task0"] * 3, keep=True), "attention", value, inputs) is value


@pytest.mark.parametrize(("base", "adapter"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_computes_in_its_own_dtype_and_returns_the_one_it_got(
    kind: str, base: torch.dtype, adapter: torch.dtype
) -> None:
    units, inputs = units_of(kind), inputs_of(5, 3)
    value = torch.randn(5, 3, D)
    names = [f"task{i % len(units)}" for i in range(5)]
    for site in sorted({site for unit in units.values() for site in unit.sites}):
        expected = run_rows(units, RowPlan(names, keep=True), site, value, inputs)
        low = inputs.map(lambda t: t.detach().to(base))
        for unit in units.values():
            unit.to(adapter)
            for source in getattr(unit, "source", ()):
                source.to(adapter)
        actual = run_rows(units, RowPlan(names, keep=True), site, value.to(base), low)
        for unit in units.values():
            unit.float()
            for source in getattr(unit, "source", ()):
                source.float()
        assert actual.dtype == base
        assert zoo.difference(actual, expected) < 0.25
        units = units_of(kind)


def test_rows_of_rows() -> None:
    """A host may select rows of a part of the batch: the mask keeps counting over the whole batch."""
    inputs = inputs_of(5, 3)
    part = select_rows(inputs, torch.tensor([4, 2, 0]))
    again = select_rows(part, torch.tensor([2, 1]))
    direct = select_rows(inputs, torch.tensor([0, 2]))
    assert torch.equal(again.read("x"), direct.read("x"))
    assert torch.equal(again.rows, direct.rows)  # type: ignore[arg-type]
    assert torch.equal(again.mask(3, 3)[0], direct.mask(3, 3)[0])  # type: ignore[arg-type]
    assert select_rows(inputs._replace(mask=no_mask), torch.tensor([1])).mask is no_mask


# Weights


def test_weights_by_name() -> None:
    unit = pal(lhuc=True)
    names = {
        f"{part}.{kind}" for part in ("query", "key", "value", "encoder", "decoder") for kind in ("weight", "bias")
    }
    assert unit.weights().keys() == names | {"rho"}
    assert unit.own_weights().keys() == {n for n in names if n[0] not in "ed"} | {"rho"}
    assert unit.weights()["encoder.weight"] is unit.source[0].encoder.weight
    assert unit.shares
    # Shared weights are registered in one place only.
    assert {n.split(".")[0] for n, _ in unit.named_parameters()} == {"query", "key", "value", "rho"}
    assert not pal(tied=False).shares
    assert pal(tied=False).weights().keys() == names
    assert TopAttention(D, 4, num_layers=1, num_heads=2).weights()["layers.0.LayerNorm.weight"].shape == (4,)


def test_shared_weights_may_be_a_mapping() -> None:
    unit, shared = PAL(D, 8, num_heads=2), Projections(D, 8)
    unit.share(dict(shared.named_parameters()))
    assert unit.weights()["decoder.bias"] is shared.decoder.bias
    other = PAL(D, 8, num_heads=2)
    other.share(shared)
    assert unit.shared_key() == other.shared_key()
    other.share(Projections(D, 8))
    assert unit.shared_key() != other.shared_key()


def test_signatures_tell_apart_what_cannot_be_one_call() -> None:
    kinds = [unit for kind in KINDS.values() for unit in (make() for make in kind)]
    for a in kinds:
        for b in kinds:
            if a.signature() == b.signature():
                assert type(a) is type(b)
                shapes = [{k: v.shape for k, v in unit.weights().items()} for unit in (a, b)]
                assert shapes[0] == shapes[1]
    assert PAL(D, 8, num_heads=2).signature() != PAL(D, 8, num_heads=4).signature()
    assert PAL(D, 8, num_heads=2).signature() != PAL(D, 8, num_heads=2, dropout=0.2).signature()
    assert LHUC(D).signature() != LHUC(D, site="ffn").signature()


def test_stacked_weights() -> None:
    units = [pal(), pal(), pal()]
    for number, unit in enumerate(units):
        zoo.randomise(unit, seed=number)
    assert stack_weights(units[:1], None) == units[0].weights()
    plain = stack_weights(units, None)
    assert all(torch.equal(plain[k][1], v) for k, v in units[1].weights().items())
    kept: dict[object, dict[str, Tensor]] = {}
    index = torch.tensor([2, 0, 0, 1])
    gathered = stack_weights(units, index, kept)
    for name, table in gathered.items():
        assert torch.equal(table, torch.stack([units[i].weights()[name] for i in index.tolist()]))
    again = stack_weights(units, index, kept)  # another block: what is shared is the same tensor
    assert all((again[k] is gathered[k]) == (k.split(".")[0] in ("encoder", "decoder")) for k in gathered)


class Loose(TaskUnit):
    """A unit whose signature says nothing about its weights."""

    sites = ("residual",)

    def __init__(self, own: dict[str, tuple[int, ...]], shared: dict[str, tuple[int, ...]] | None = None) -> None:
        super().__init__()
        for name, shape in own.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        if shared is not None:
            self.share({name: torch.zeros(shape) for name, shape in shared.items()})

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Any) -> Tensor:
        return value


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([Loose({"a": (2,)}), Loose({"a": (2,), "b": (3,)})], r"'b' differ in shape: none and \[3\]"),
        ([Loose({"a": (2,), "b": (3,)}), Loose({"a": (2,)})], r"'b' differ in shape: \[3\] and none"),
        ([Loose({"a": (2,)}), Loose({"a": (2,)}), Loose({"a": (2, 1)})], r"'a' differ in shape: \[2\] and \[2, 1\]"),
        ([Loose({}, {"a": (2,)}), Loose({}, {"a": (3,)})], r"'a' differ in shape"),
        ([Loose({}), Loose({}, {"a": (3,)})], r"'a' differ in shape"),
        ([Loose({}, {"a": (3,)}), Loose({})], r"'a' differ in shape"),
        ([Loose({"a": (2,)}), Loose({}, {"a": (2,)})], r"'a' differ in shape"),
    ],
)  # fmt: skip
def test_equal_signatures_with_other_weights(units: list[TaskUnit], message: str) -> None:
    """An error, not weights of one unit that are left out of the batch."""
    value, named = torch.randn(len(units), 2, D), {str(number): unit for number, unit in enumerate(units)}
    with pytest.raises(UnsupportedError, match=message) as error:
        run_rows(named, RowPlan(list(named), keep=True), "residual", value, UnitInputs())
    assert "Return different signatures for them" in str(error.value)


def test_init_linear() -> None:
    layer = nn.Linear(300, 200)
    nn.init.ones_(layer.bias)
    init_linear(layer)
    assert abs(layer.weight.std().item() - 0.02) < 1e-3
    assert abs(layer.weight.mean().item()) < 1e-3
    assert layer.weight.abs().max() > 0.06  # not cut
    assert not layer.bias.any()
    init_linear(layer, zero=True)
    assert not layer.weight.any()
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    for same in (a, b):
        init_linear(same, generator=torch.Generator().manual_seed(4))
    assert torch.equal(a.weight, b.weight)
    init_linear(nn.Linear(3, 3, device="meta"), generator=torch.Generator())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("identity", [False, True])
def test_initialisation_draws_from_its_generator_alone(kind: str, identity: bool) -> None:
    for make in KINDS[kind]:
        tables = []
        for seed in (3, 3, 4):
            unit = make()
            torch.manual_seed(len(tables))
            before = torch.get_rng_state()
            reset(unit, identity=identity and identity_of(unit), seed=seed)
            assert torch.equal(torch.get_rng_state(), before), "drawn from torch's own generator"
            tables.append(unit.weights())
        assert all(torch.equal(tables[0][k], tables[1][k]) for k in tables[0])
        random = any(not torch.equal(tables[0][k], tables[2][k]) for k in tables[0])
        assert random or (identity and isinstance(unit, LHUC))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in RECORDS or RECORDS[k].method.identity])
def test_identity_leaves_the_value_as_it_is_and_lets_gradients_through(kind: str) -> None:
    inputs, value = inputs_of(3, 2), torch.randn(3, 2, D)
    for make in KINDS[kind]:
        unit = make()
        reset(unit, identity=True)
        for site in unit.sites:
            result = run_unit(unit, site, value, inputs)
            assert torch.equal(result, value)
            weights = unit.weights()
            gradients = torch.autograd.grad(
                (result * torch.randn(3, 2, D)).sum(), list(weights.values()), allow_unused=True
            )
            assert any(g is not None and g.abs().max() > 0 for g in gradients)


def test_inputs() -> None:
    inputs = UnitInputs(x=torch.ones(1, 2, 3), raw=None, h=torch.zeros(1, 2, 3))
    mapped = inputs.map(lambda t: t + 1)
    assert mapped.read("x").max() == 2
    assert mapped.read("h").max() == 1
    assert mapped.raw is None
    with pytest.raises(UnsupportedError, match="raw was not captured"):
        inputs.read("raw")
    assert inputs.mask(3, 4) == (None, False)
