"""Compositions over examples: every form of `task_ids`, wrong sizes, and LoRA together with task modules."""

from __future__ import annotations

import copy
from typing import Any

import adapters
import numpy as np
import pytest
import torch
from adapters import AutoAdapterModel
from adapters.composition import Average, BatchSplit, MultiTask, Parallel, Split, Stack
from torch import Tensor, nn

from pal_adapters import (
    LHUCConfig,
    LowRankConfig,
    PALConfig,
    TopAttentionConfig,
    UnknownAdapterError,
    UnsupportedError,
)

from .tiny import SMALL, Run, output, randomise, with_adapters

CONFIGS: dict[str, Any] = {
    "a": PALConfig(hidden_size=12, init_weights="bert"),
    "b": PALConfig(hidden_size=12),
    "c": PALConfig(hidden_size=18),  # another width
    "low": LowRankConfig(hidden_size=4),
    "lhuc": LHUCConfig(),
    "top": TopAttentionConfig(hidden_size=12, num_layers=1, num_heads=2),
    "lora": adapters.LoRAConfig(init_weights="bert"),
    "ia3": adapters.IA3Config(),
    "dora": adapters.DoRAConfig(),
    "seq": "seq_bn",
    "ul": adapters.ConfigUnion(PALConfig(hidden_size=12), adapters.LoRAConfig()),
    "part": PALConfig(hidden_size=12, leave_out=[0, 1]),
}


@pytest.fixture(scope="module")
def model(plain_bert: nn.Module) -> nn.Module:
    return with_adapters(plain_bert, CONFIGS, seed=2)


def rows(run: Run, names: list[Any]) -> Tensor:
    return torch.stack([run(name)[row] for row, name in enumerate(names)])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


TASKS = ["c", "a", "low", "a"]
FORMS: dict[str, Any] = {
    "names": TASKS,
    "integers": [2, 0, 3, 0],
    "tensor": torch.tensor([2, 0, 3, 0]),
    "column": torch.tensor([[2], [0], [3], [0]]),
    "int32": torch.tensor([2, 0, 3, 0], dtype=torch.int32),
    "array": np.array([2, 0, 3, 0]),
    "mixed": ["c", 0, np.int64(3), "a"],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_task_ids(form: str, run: Run) -> None:
    close(run(MultiTask("a", "b", "c", "low"), task_ids=FORMS[form]), rows(run, TASKS))


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1], [4, 0, 5, 2], [6, 6, 0, 6], [5, 3, 5, 4]])
def test_order_repetition_and_absence(ids: list[int], run: Run) -> None:
    tasks = ["a", "b", "c", "low", "lhuc", "top", "part"]
    close(run(MultiTask(*tasks), task_ids=ids), rows(run, [tasks[i] for i in ids]))


def test_every_method_in_one_batch(plain_bert: nn.Module, batch: dict[str, Tensor]) -> None:
    model = with_adapters(plain_bert, SMALL, seed=3)
    found = {}
    for first in range(0, len(SMALL), 4):
        names = [*SMALL, *SMALL][first : first + 4]
        given = output(model, batch, MultiTask(*SMALL), task_ids=names)
        found |= {name: (given[row], output(model, batch, name)[row]) for row, name in enumerate(names)}
    assert found.keys() == SMALL.keys()
    for mixed, alone in found.values():
        close(mixed, alone)


def test_a_row_gets_the_same_in_every_batch(run: Run) -> None:
    tasks = ("a", "b", "c")
    first = run(MultiTask(*tasks), task_ids=[0, 1, 2, 0])
    second = run(MultiTask(*tasks), task_ids=[0, 2, 1, 0])
    close(first[[0, 3]], second[[0, 3]])
    assert (first[[1, 2]] - second[[1, 2]]).abs().max() > 1e-3


def test_one_task(run: Run) -> None:
    close(run(MultiTask("a"), task_ids=[0, 0, 0, 0]), run("a"))


WRONG: list[tuple[Any, type[Exception], str]] = [
    (None, UnsupportedError, r"MultiTask\(a, low\).*task_ids is None"),
    (["a", "b", "low", "a"], UnknownAdapterError, r"'b'.*\['a', 'low'\].*from 0 to 1"),
    ([0, 1, 2, 0], UnknownAdapterError, "has 2.*from 0 to 1"),
    ([0, -1, 0, 0], UnknownAdapterError, "has -1"),
    (torch.tensor([0.0, 1.0, 0.0, 0.0]), UnknownAdapterError, "has 0.0"),
    ([True, False, True, False], UnknownAdapterError, "has True"),
    ([0, 1, 0], UnsupportedError, "3 entries.*4 examples"),
    ([0, 1, 0, 1, 0], UnsupportedError, "5 entries.*4 examples"),
    ([], UnsupportedError, "0 entries"),
]


@pytest.mark.parametrize("setup", [MultiTask("a", "low"), Stack("seq", MultiTask("a", "low"))], ids=str)
@pytest.mark.parametrize(("ids", "error", "message"), WRONG, ids=lambda v: str(v)[:25])
def test_wrong_task_ids_are_rejected_and_the_model_still_works(
    ids: Any, error: type[Exception], message: str, setup: Any, run: Run
) -> None:
    before = run("a")
    with pytest.raises(error, match=message):
        run(setup, task_ids=ids)
    assert torch.equal(run("a"), before)
    close(run(MultiTask("a", "low"), task_ids=["a", "low", "a", "a"])[[0, 2, 3]], before[[0, 2, 3]])


@pytest.mark.parametrize("sizes", [[1, 2], [3, 2], [5, -1, 1]])
@pytest.mark.parametrize("other", ["low", "seq", "top"])
def test_batch_split_of_wrong_size(sizes: list[int], other: str, run: Run) -> None:
    before = run("a")
    names = ["a", other, "b"][: len(sizes)]
    if sum(sizes) != 4:
        with pytest.raises(IndexError):
            run(BatchSplit(*names, batch_sizes=sizes))
    assert torch.equal(run("a"), before)


def test_batch_split_with_an_empty_part(run: Run) -> None:
    close(run(BatchSplit("a", "low", "c", batch_sizes=[2, 0, 2])), rows(run, ["a", "a", "c", "c"]))
    close(run(BatchSplit("a", "seq", "c", batch_sizes=[2, 0, 2])), rows(run, ["a", "a", "c", "c"]))


def test_split_of_wrong_length(run: Run) -> None:
    with pytest.raises(IndexError, match="6 tokens"):
        run(Split("a", "low", splits=[2, 5]))


# LoRA acts inside the host's attention, ours behind the feed-forward part


WITH_LORA = [(ours, "lora") for ours in ("a", "low", "lhuc", "top", "ul", "part")] + [("a", "ia3"), ("low", "ia3")]


@pytest.mark.parametrize(("ours", "other"), WITH_LORA)
def test_rows_with_lora(ours: str, other: str, run: Run) -> None:
    close(run(BatchSplit(ours, other, batch_sizes=[1, 3])), rows(run, [ours, other, other, other]))
    close(run(MultiTask(other, ours), task_ids=torch.tensor([1, 0, 1, 0])), rows(run, [ours, other, ours, other]))
    close(run(MultiTask(other, ours), task_ids=[0, 0, 0, 0]), run(other))
    close(run(Parallel(other, ours)), torch.cat([run(other), run(ours)]))
    close(run(Parallel(ours, other)), torch.cat([run(ours), run(other)]))


def test_stack_and_union_with_lora(run: Run, model: nn.Module, batch: dict[str, Tensor]) -> None:
    union, apart = run("ul"), copy.deepcopy(model)
    apart.add_adapter("p", config=PALConfig(hidden_size=12))
    apart.add_adapter("l", config=adapters.LoRAConfig())
    for key, value in list(apart.state_dict().items()):
        for old, new in (("pal_adapters.ul.", "pal_adapters.p."), ("shared_parameters.ul.", "shared_parameters.p."),
                         ("loras.ul.", "loras.l.")):  # fmt: skip
            if old in key:
                apart.state_dict()[key.replace(old, new)].copy_(value)
    for setup in (Stack("p", "l"), Stack("l", "p")):
        apart.set_active_adapters(setup)
        with torch.no_grad():
            close(apart(**batch).last_hidden_state, union)


def test_three_kinds_in_one_batch(run: Run) -> None:
    names = ["lora", "a", "seq", "c"]
    close(run(BatchSplit(*names, batch_sizes=1)), rows(run, names))
    close(run(MultiTask(*names), task_ids=[2, 3, 0, 1]), rows(run, ["seq", "c", "lora", "a"]))
    close(run(Parallel(*names)), torch.cat([run(name) for name in names]))
    close(run(BatchSplit(Stack("a", "lora"), "low", batch_sizes=2)), rows(run, [Stack("a", "lora")] * 2 + ["low"] * 2))


def test_average_with_lora_is_the_average_of_outputs(run: Run, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Both only add a term, so a weight of 1/4 equals an adapter scaled by 1/4."""
    scaled = copy.deepcopy(model)
    for key, value in scaled.state_dict().items():
        if "loras.lora.lora_B" in key:
            value.mul_(0.25)
        if "pal_adapters.low.low_rank.decoder" in key:
            value.mul_(0.75)
    scaled.set_active_adapters(Stack("lora", "low"))
    with torch.no_grad():
        expected = scaled(**batch).last_hidden_state
    close(run(Average("lora", "low", weights=[1.0, 3.0])), expected)
    close(run(Average("low", "lora", weights=[3.0, 1.0])), expected)


def test_dora_rejects_other_rows(run: Run) -> None:
    with pytest.raises(UnsupportedError, match=r"'dora' \(DoRA\) scales all examples"):
        run(BatchSplit("a", "dora", batch_sizes=2))


@pytest.mark.parametrize("pair", [("a", "top"), ("lhuc", "top"), ("seq", "top"), ("top", "low")], ids="-".join)
def test_rows_with_a_module_on_top(pair: tuple[str, str], run: Run) -> None:
    """The module on top still sees the mask after other modules in the last block."""
    first, second = pair
    close(run(BatchSplit(first, second, batch_sizes=[2, 2])), rows(run, [first, first, second, second]))
    close(run(Parallel(first, second)), torch.cat([run(first), run(second)]))


def test_stack_with_a_module_on_top_keeps_the_mask(run: Run, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """The values of padding do not matter, also after a bottleneck and a fusion."""
    model.add_adapter_fusion(adapters.Fuse("a", "seq"))
    model.eval()
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    for setup in (Stack("a", "seq", "top"), Stack(adapters.Fuse("a", "seq"), "top")):
        kept = batch["attention_mask"].bool()
        expected = run(setup)
        with torch.no_grad():
            close(model(**changed).last_hidden_state[kept], expected[kept])
    model.delete_adapter_fusion(adapters.Fuse("a", "seq"))


# Heads


def test_parallel_heads_and_batch_split_heads(batch: dict[str, Tensor], base_path: Any) -> None:
    model = AutoAdapterModel.from_pretrained(base_path)
    for name, labels in (("a", 2), ("low", 3)):
        model.add_adapter(name, config=CONFIGS[name])
        model.add_classification_head(name, num_labels=labels)
    randomise(model, "a", "low")
    model.eval()
    single = {}
    for name in ("a", "low"):
        model.set_active_adapters(name)
        with torch.no_grad():
            single[name] = model(**batch).logits
    model.set_active_adapters(Parallel("a", "low"))
    assert model.active_head == ["a", "low"]
    with torch.no_grad():
        outputs = model(**batch)
    close(outputs[0].logits, single["a"])
    close(outputs[1].logits, single["low"])
    model.set_active_adapters(BatchSplit("low", "a", batch_sizes=[3, 1]))
    with torch.no_grad():
        outputs = model(**batch)
    close(outputs[0].logits, single["low"][:3])
    close(outputs[1].logits, single["a"][3:])


# Gradients


@pytest.mark.parametrize("setup", [MultiTask("a", "b", "c"), BatchSplit("a", "b", batch_sizes=[2, 2]),
                                   Parallel("a", "seq"), Average("a", "low")], ids=str)  # fmt: skip
def test_gradients_equal_those_of_single_runs(setup: Any, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Each adapter gets the gradient of its own examples; without examples it gets none, or zero."""
    model = copy.deepcopy(model)
    names = sorted(setup.flatten())
    ids = [0, 1, 0, 0]
    model.train_adapter(setup)
    model.eval()
    weight = torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(4))

    def gradients(active: Any, weights: Tensor, **more: Any) -> dict[str, Tensor]:
        model.zero_grad()
        model.set_active_adapters(active)
        (model(**batch, **more).last_hidden_state * weights).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    if isinstance(setup, Average):
        found = gradients(setup, weight)
        assert all(any(f".{name}." in key for key in found) for name in names)
        assert all(grad.abs().max() > 0 for key, grad in found.items() if "key.bias" not in key)
        return
    if isinstance(setup, Parallel):
        found, parts = gradients(setup, weight.repeat(2, 1, 1)), {name: torch.ones(4) for name in names}
    else:
        chosen = ids if isinstance(setup, MultiTask) else [0, 0, 1, 1]
        parts = {name: torch.tensor([float(setup[c] == name) for c in chosen]) for name in names}
        found = gradients(setup, weight, **({"task_ids": ids} if isinstance(setup, MultiTask) else {}))
    for name, part in parts.items():
        expected = gradients(name, weight * part[:, None, None])
        for key, grad in expected.items():
            if f".{name}." in key:
                assert (key in found) or not part.any(), key
                torch.testing.assert_close(found.get(key, torch.zeros_like(grad)), grad, atol=1e-4, rtol=1e-4)
