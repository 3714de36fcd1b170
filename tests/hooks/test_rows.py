"""How the examples of a mixed batch are grouped: the rule, the values, what is made once per pass, and the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import BertConfig, BertModel

import pal_adapters
from pal_adapters.hooks import rows as rows_module
from pal_adapters.hooks.rows import RowPlan, layout_of, run_rows, run_unit, select_rows
from pal_adapters.hosts.method import REGISTERED
from pal_adapters.methods.top.layer import TopBertLayer
from pal_adapters.nn import functional
from pal_adapters.nn.unit import UnitInputs
from tests import zoo
from tests.nn.test_unit import KINDS, inputs_of, tensors

HOSTS = [host for host in ("adapters", "peft") if REGISTERED[host]]
# By layout, how many examples each of three tasks has.
COUNTS = {"tasks": (3, 3, 3), "padded": (5, 4, 4), "calls": (6, 1, 2), "examples": (2, 1, 1)}


@pytest.mark.parametrize(
    ("counts", "layout"),
    [
        *((counts, layout) for layout, counts in COUNTS.items()),
        ([4], "tasks"),
        ([1] * 64, "tasks"),  # one example per task: as many products as examples, and no copies
        ([1] * 48 + [2] * 8, "examples"),
        ([8, 8, 8, 6], "padded"),
        ([5, 3], "padded"),  # 10 examples instead of 8, a quarter more
        ([6, 3], "calls"),
        ([30, 2], "calls"),
    ],
)
def test_the_rule(counts: Sequence[int], layout: str) -> None:
    assert layout_of(counts) == layout
    assert layout_of(counts, launches_cost=False) == "calls"


@pytest.mark.parametrize("layout", COUNTS)
@pytest.mark.parametrize("order", ["by task", "shuffled", "with others"])
@pytest.mark.parametrize("batched", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "different kinds"])
def test_every_layout_equals_one_call_per_example(
    kind: str, batched: bool, order: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, in the order of the tasks, in any other, and beside examples without an adapter."""
    for module in (rows_module, functional):
        monkeypatch.setattr(module, "batches_tasks", lambda device: batched)
    made = KINDS[kind][0]
    units = {f"task{number}": made().eval() for number in range(3)}
    for number, unit in enumerate(units.values()):
        zoo.randomise(unit, seed=number)
    names = [name for name, count in zip(units, COUNTS[layout], strict=True) for _ in range(count)]
    names += ["__base__"] * 2 if order == "with others" else []
    if order != "by task":
        names = [names[at] for at in torch.randperm(len(names), generator=torch.Generator().manual_seed(1)).tolist()]
    inputs, value = inputs_of(len(names), 3), torch.randn(len(names), 3, 12, requires_grad=True)
    plan = RowPlan(names, keep=True)
    for site in sorted({site for unit in units.values() for site in unit.sites}):
        mixed = run_rows(units, plan, site, value, inputs)
        rows = []
        for row, name in enumerate(names):
            alone, one = select_rows(inputs, torch.tensor([row])), value[row : row + 1]
            rows.append(run_unit(units[name], site, one, alone) if name in units else one)
        expected = torch.cat(rows)
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=2e-5)
        wanted, weight = tensors(units, inputs, value), torch.randn(expected.shape)
        a, b = (torch.autograd.grad((t * weight).sum(), wanted, allow_unused=True) for t in (mixed, expected))
        for first, second in zip(a, b, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(zero if first is None else first, zero if second is None else second,
                                       rtol=1e-3, atol=1e-4)  # fmt: skip


class _Counts(TorchFunctionMode):
    """Counts what makes a tensor from Python values, or reads one: on an accelerator, both wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("tensor", "as_tensor", "tolist", "item", "__bool__", "__int__", "nonzero", "unique", "arange"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def _mixed_model(host: str, method: str, blocks: int) -> tuple[nn.Module, dict[str, Any]]:
    base: Any = BertModel(
        BertConfig(
            hidden_size=24, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=32, vocab_size=30
        )
    )
    config = {"pal": "PAL", "low_rank": "LowRank", "houlsby": "Houlsby"}[method]
    if host == "peft":
        from peft import get_peft_model

        made = getattr(pal_adapters, f"{config}PeftConfig")(hidden_size=12, task_type="FEATURE_EXTRACTION")
        model: Any = get_peft_model(base, made, adapter_name="rte")
        model.add_adapter("cola", made)
        return model, {"adapter_names": ["rte", "cola", "rte", "cola", "cola"]}
    import adapters
    from adapters.composition import MultiTask

    adapters.init(base)
    for name in ("rte", "cola"):
        base.add_adapter(name, config=getattr(pal_adapters, f"{config}Config")(hidden_size=12))
    base.set_active_adapters(MultiTask("rte", "cola"))
    return base, {"task_ids": torch.tensor([0, 1, 0, 1, 1])}


CASES = [(h, m) for h in HOSTS for m in ("pal", "low_rank", "houlsby") if (h, m) != ("adapters", "houlsby")]


@pytest.mark.parametrize(("host", "method"), CASES)
def test_more_blocks_make_and_read_no_more_index_tensors(host: str, method: str) -> None:
    found = []
    for blocks in (1, 3):
        plain, mixed = _Counts(), _Counts()
        model, more = _mixed_model(host, method, blocks)
        ids = torch.ones(5, 7, dtype=torch.long)
        with mixed:
            model.eval()(input_ids=ids, **more)
        base: Any = BertModel(model.config).eval()
        with plain:
            base(input_ids=ids)
        found.append(mixed.found - plain.found)
    assert found[0] == found[1]
    assert found[0].total() <= 8


def _saved(units: dict[str, Any], names: Sequence[str], tokens: int) -> int:
    """Bytes that a training step keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    value = torch.randn(len(names), tokens, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_rows(units, RowPlan(names, keep=True), "stack_output", value, UnitInputs(batch=len(names)))
    return sum(kept.values())


@pytest.mark.parametrize("counts", [(1, 1), (5, 4), (6, 1)])
def test_memory_of_a_step_grows_with_the_activations_alone(counts: tuple[int, int]) -> None:
    """Eight times the examples of each task need no further copy of the weights."""
    units = {name: TopBertLayer(48, 96, num_heads=2).train() for name in ("a", "b")}
    weights = sum(p.numel() * p.element_size() for p in units["a"].parameters() if p.dim() == 2)

    def growth(names: Sequence[str]) -> int:
        few, many = (_saved(units, [name for name in names for _ in range(times)], 2) for times in (2, 16))
        return many - few

    mixed = growth(["a"] * counts[0] + ["b"] * counts[1])
    assert mixed < 1.3 * growth(["a"] * sum(counts)) + weights
