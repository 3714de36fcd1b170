"""The values of every composition, against plain torch and against runs of single adapters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import adapters
import pytest
import torch
from adapters.composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from torch import Tensor, nn

from pal_adapters import LHUCConfig, LowRankConfig, PALConfig, ParallelHoulsbyConfig, UnsupportedError

from . import reference as ref
from .tiny import Run, with_adapters

HEADS = 3
CONFIGS = {
    "pal": PALConfig(hidden_size=12, num_heads=HEADS),
    "wide": PALConfig(hidden_size=18, num_heads=HEADS),
    "low": LowRankConfig(hidden_size=5),
    "par": ParallelHoulsbyConfig(hidden_size=5),
    "seq": "seq_bn",
    "both": "double_seq_bn",
    "side": "par_bn",
    "plus": adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "union": adapters.ConfigUnion(PALConfig(hidden_size=12, num_heads=HEADS), adapters.SeqBnConfig()),
}
OURS = ("pal", "wide", "low", "par", "union")


@pytest.fixture(scope="module")
def model(plain_bert: nn.Module) -> nn.Module:
    """All of `CONFIGS` on one model; tests change only the active setup."""
    return with_adapters(plain_bert, CONFIGS, seed=1)


class Plain:
    """The adapters of `CONFIGS` and the compositions in plain torch, on `o1` and on `o2`."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch
        self.pals = {n: ref.weights_of(model, n, "pal") for n in ("pal", "wide", "union")}
        self.low = ref.weights_of(model, "low", "low_rank")
        self.par = ref.weights_of(model, "par", "parallel_houlsby")
        self.tasks: list[str] = []
        self.probabilities: list[Tensor] = []

    def o1(self, name: str, block: ref.Block, value: Tensor) -> Tensor | None:
        """What an adapter adds to `o1`, or None."""
        if name == "par":
            return ref.low_rank(value, self.par[block.index], "attention.")
        if name == "both":
            return ref.bottleneck(value, self.model.get_adapter(name)[block.index]["mh_adapter"])
        return None

    def o2(self, name: str, block: ref.Block, value: Tensor) -> Tensor | None:
        """What an adapter adds to `o2`, or None."""
        term = torch.zeros_like(value)
        if name in self.pals:
            term = ref.pal(block.x, self.pals[name][block.index], HEADS, block.mask)
        if name == "low":
            term = ref.low_rank(block.x, self.low[block.index])
        if name == "par":
            term = ref.low_rank(block.h1, self.par[block.index], "ffn.")
        if name in ("seq", "union", "both", "side"):
            adapter = self.model.get_adapter(name)[block.index]["output_adapter"]
            value = value + term
            read = {"both": value, "side": block.h1}.get(name, block.norm(value + block.h1))
            term = term + ref.bottleneck(read, adapter)
        return term

    def terms(self, site: Any, setup: Any, block: ref.Block, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """The value after a setup, and what its last adapter added."""
        if all(site(name, block, value) is None for name in ([setup] if isinstance(setup, str) else setup.flatten())):
            return value, None
        if isinstance(setup, str):
            term = site(setup, block, value)
            return (value if term is None else value + term), term
        term = None
        if isinstance(setup, Stack):
            for child in setup:
                value, term = self.terms(site, child, block, value)
        elif isinstance(setup, Average):
            outputs = [self.terms(site, child, block, value)[0] for child in setup]
            value = sum(w * o for w, o in zip(setup.weights, outputs, strict=True))
        elif isinstance(setup, Fuse) and site == self.o2:
            found = [self.terms(site, child, block, value)[1] for child in setup]
            layer = self.model.encoder.layer[block.index].output.adapter_fusion_layer[setup.name]
            fused, probabilities = ref.fusion(block.norm(value + block.h1), found, layer)
            self.probabilities.append(probabilities)
            value = value + fused
        elif isinstance(setup, Split):
            starts = [sum(setup.splits[:i]) for i in range(len(setup) + 1)]
            parts = [slice(a, b) for a, b in itertools.pairwise(starts)]
            value = torch.cat(
                [self.terms(site, c, block.part(tokens=p), value[:, p])[0] for c, p in zip(setup, parts, strict=True)],
                1,
            )
        elif isinstance(setup, (BatchSplit, MultiTask, Parallel)):
            value = value.clone()
            for child, chosen in zip(setup, self.rows(setup, value.shape[0]), strict=True):
                value[chosen] = self.terms(site, child, block.part(rows=chosen), value[chosen])[0]
        return value, term

    def rows(self, setup: Any, batch: int) -> list[list[int]]:
        if isinstance(setup, MultiTask):
            return [[r for r, t in enumerate(self.tasks) if t == i] for i in range(len(setup))]
        sizes = setup.batch_sizes if isinstance(setup, BatchSplit) else [batch // len(setup)] * len(setup)
        return [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]

    def run(self, setup: Any, tasks: list[int] | None = None) -> Tensor:
        self.tasks, self.probabilities = tasks or [], []
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
        channels = setup.parallel_channels if not isinstance(setup, str) else 1
        with torch.no_grad():
            return ref.bert(
                self.model, ids.repeat(channels, 1), mask.repeat(channels, 1),
                o1=lambda block, value: self.terms(self.o1, setup, block, value)[0],
                o2=lambda block, value: self.terms(self.o2, setup, block, value)[0],
            )  # fmt: skip


@pytest.fixture
def plain(model: nn.Module, batch: dict[str, Tensor]) -> Plain:
    return Plain(model, batch)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "plus"])
def test_single_adapter(name: str, run: Run, plain: Plain) -> None:
    close(run(name), plain.run(name))


STACKS = [("pal", "low"), ("low", "par", "wide"), ("pal", "seq"), ("seq", "pal"), ("both", "par"), ("par", "both"),
          ("side", "low"), ("union", "pal"), ("seq", "union", "side")]  # fmt: skip


@pytest.mark.parametrize("names", STACKS, ids="-".join)
def test_stack_runs_in_order(names: tuple[str, ...], run: Run, plain: Plain) -> None:
    close(run(Stack(*names)), plain.run(Stack(*names)))


def test_order_of_a_stack_matters_to_a_bottleneck(run: Run) -> None:
    assert (run(Stack("pal", "seq")) - run(Stack("seq", "pal"))).abs().max() > 1e-3


def rows(run: Run, names: list[str]) -> Tensor:
    """Each example from a run with only its adapter."""
    return torch.stack([run(name)[row] for row, name in enumerate(names)])


PAIRS = [(a, b) for a in OURS for b in CONFIGS if a != b]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_batch_split_equals_single_runs(a: str, b: str, run: Run) -> None:
    close(run(BatchSplit(a, b, batch_sizes=[1, 3])), rows(run, [a, b, b, b]))
    close(run(BatchSplit(b, a, batch_sizes=[2, 2])), rows(run, [b, b, a, a]))


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_parallel_equals_single_runs(a: str, b: str, run: Run) -> None:
    close(run(Parallel(b, a)), torch.cat([run(b), run(a)]))


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_multi_task_equals_single_runs(a: str, b: str, run: Run) -> None:
    close(run(MultiTask(a, b), task_ids=[b, a, a, b]), rows(run, [b, a, a, b]))


# A composition of compositions, as `adapters.composition.ALLOWED_NESTINGS` lets them nest.
NESTED = [
    Average("pal", "low", "par", weights=[0.5, 0.2, 0.3]),
    Average("pal", "wide", weights=[2.0, 1.0], normalize_weights=False),
    Average("pal", "seq", weights=[0.25, 0.75]),
    Split("pal", "low", splits=[2, 4]),
    Split("pal", "seq", "wide", splits=2),
    Stack("low", Average("pal", "both"), "par"),
    Stack("pal", Split("low", "seq", splits=[4, 2]), "side"),
    Stack("seq", BatchSplit("pal", "low", batch_sizes=[3, 1]), "wide"),
    Stack("pal", Parallel("low", "seq"), "par"),
    Stack("pal", MultiTask("low", "wide", "par")),
    Stack("low", MultiTask("pal", "seq")),
    Split(Split("pal", "wide", splits=[1, 2]), "low", splits=[3, 3]),
    Split("low", Split("pal", "seq", splits=[2, 2]), splits=[2, 4]),
    Split(Stack("pal", "low"), BatchSplit("par", "pal", batch_sizes=2), splits=3),
    Split(Average("pal", "wide"), "par", splits=3),
    Parallel(Stack("pal", "low"), "par"),
    Parallel(Average("pal", "low"), BatchSplit("wide", "pal", batch_sizes=[1, 3])),
    Parallel("par", BatchSplit("pal", "seq", batch_sizes=[2, 2])),
    MultiTask(Stack("pal", "low"), Average("wide", "par"), "low"),
    MultiTask(Stack("pal", "seq"), "both", Average("seq", "par")),
    BatchSplit(Stack("pal", "low"), "wide", batch_sizes=[2, 2]),
    BatchSplit(Split("pal", "low", splits=3), Average("pal", "par"), batch_sizes=[1, 3]),
    BatchSplit("low", BatchSplit("wide", "pal", batch_sizes=[1, 2]), batch_sizes=[1, 3]),
    BatchSplit("seq", BatchSplit("wide", "pal", batch_sizes=[2, 1]), batch_sizes=[1, 3]),
    Average(Stack("pal", "low"), Split("par", "wide", splits=3), BatchSplit("low", "pal", batch_sizes=2)),
]


@pytest.mark.parametrize("setup", NESTED, ids=str)
def test_nested_compositions(setup: Any, run: Run, plain: Plain, batch: dict[str, Tensor]) -> None:
    tasks = [1, 0, 1, 0]
    more = {"task_ids": torch.tensor(tasks)} if "MultiTask" in str(setup) else {}
    actual, expected = run(setup, **more), plain.run(setup, tasks)
    kept = batch["attention_mask"].bool().repeat(setup.parallel_channels, 1)  # a part may be all padding
    close(actual[kept], expected[kept])


# Fusions. The host's layer weighs what the children added behind the feed-forward part.
FUSIONS = [
    Fuse("pal", "low"),
    Fuse("pal", "wide", "low"),
    Fuse("seq", "pal"),
    Fuse("pal", "seq"),
    Fuse(Stack("low", "pal"), "seq"),
    Fuse("pal", Stack("par", "seq", "low")),
    Stack("par", Fuse("pal", "low"), "seq"),
    MultiTask(Fuse("pal", "low"), "par", "seq"),
]


@pytest.fixture
def fused(model: nn.Module) -> Iterator[nn.Module]:
    """The model with the fusions of `FUSIONS` and random fusion layers."""
    names = {fuse.name for setup in FUSIONS for fuse in [setup, *setup] if isinstance(fuse, Fuse)}
    torch.manual_seed(5)
    for name in sorted(names):
        model.add_adapter_fusion(name.split(","))
    for layer in model.encoder.layer:
        for parameter in layer.output.adapter_fusion_layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.eval()
    yield model
    model.set_active_adapters(None)
    for name in names:
        model.delete_adapter_fusion(name)


@pytest.mark.parametrize("setup", FUSIONS, ids=str)
def test_fusion(setup: Any, fused: nn.Module, run: Run, plain: Plain) -> None:
    tasks = [1, 0, 2, 0]
    more = {"task_ids": tasks} if isinstance(setup, MultiTask) else {}
    close(run(setup, **more), plain.run(setup, tasks))


def test_fusion_attentions(fused: nn.Module, plain: Plain, batch: dict[str, Tensor]) -> None:
    setup = Fuse("seq", "pal")
    fused.set_active_adapters(setup)
    with torch.no_grad():
        found = fused(**batch, output_adapter_fusion_attentions=True).adapter_fusion_attentions["seq,pal"]
    plain.run(setup)
    for index, expected in enumerate(plain.probabilities):
        close(torch.tensor(found[index]["output_adapter"]), expected)


def test_order_of_the_children_does_not_matter(fused: nn.Module, run: Run) -> None:
    for layer in fused.encoder.layer:
        fusions = layer.output.adapter_fusion_layer
        fusions["pal,seq"].load_state_dict(fusions["seq,pal"].state_dict())
    close(run(Fuse("pal", "seq")), run(Fuse("seq", "pal")))


def test_fusion_with_zero_values_is_the_host(fused: nn.Module, run: Run) -> None:
    """With `V = 0`, only what the host does around a fusion remains: its norm of `o2 + h1`, once."""
    for layer in fused.encoder.layer:
        nn.init.zeros_(layer.output.adapter_fusion_layer["pal,low"].value.weight)
    close(run(Fuse("pal", "low")), run(None))


def test_a_fusion_of_parallel_bottlenecks_adds_the_stream_once(model: nn.Module, run: Run, plain: Plain) -> None:
    setup = Fuse("pal", "side")
    model.add_adapter_fusion(setup)
    model.eval()
    for layer in model.encoder.layer:
        nn.init.zeros_(layer.output.adapter_fusion_layer["pal,side"].value.weight)
    close(run(setup), run(None))
    model.delete_adapter_fusion(setup)


def test_a_fusion_that_was_not_added_is_rejected(model: nn.Module, run: Run) -> None:
    with pytest.raises(UnsupportedError, match=r"Fuse\[pal, low\].*add_adapter_fusion first"):
        run(Fuse("pal", "low"))


@pytest.mark.parametrize("names", [("pal", "par"), ("par", "seq"), ("lhuc", "pal"), ("lhuc", "lhuc2")], ids="-".join)
def test_what_cannot_be_fused_is_rejected_and_leaves_no_trace(names: tuple[str, str], bert: nn.Module) -> None:
    for name in names:
        bert.add_adapter(name, config=CONFIGS.get(name, LHUCConfig()))
    before = {key: value.clone() for key, value in bert.state_dict().items()}
    with pytest.raises(
        UnsupportedError, match=r"Fuse.*acts elsewhere\. Fuse bottlenecks, or adapters of type low_rank, pal"
    ):
        bert.add_adapter_fusion(Fuse(*names))
    assert not bert.adapters_config.fusions
    assert before.keys() == bert.state_dict().keys()


def test_a_fusion_that_the_host_rejects_leaves_no_trace(bert: nn.Module) -> None:
    bert.add_adapter("pal", config=CONFIGS["pal"])
    bert.add_adapter("both", config="double_seq_bn")
    with pytest.raises(ValueError, match="mh_adapter"):
        bert.add_adapter_fusion(Fuse("pal", "both"))
    assert not bert.adapters_config.fusions
    assert not [key for key in bert.state_dict() if "fusion" in key]


def test_training_a_fusion(fused: nn.Module, batch: dict[str, Tensor]) -> None:
    model = copy.deepcopy(fused)
    setup = Fuse("pal", "seq")
    model.train_adapter_fusion(setup)
    model(**batch).last_hidden_state.pow(2).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if f"adapter_fusion_layer.{setup.name}." in name}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n in trained
               and "query.bias" not in n and "key.bias" not in n)  # fmt: skip


def test_training_a_fusion_with_its_adapters(fused: nn.Module, batch: dict[str, Tensor]) -> None:
    model = copy.deepcopy(fused)
    model.train_adapter_fusion(Fuse("pal", "low"), unfreeze_adapters=True)
    model(**batch).last_hidden_state.pow(2).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = ("adapter_fusion_layer.pal,low.", "pal_adapters.pal.", "pal_adapters.low.", "shared_parameters.pal.")
    assert trained == {n for n, _ in model.named_parameters() if any(part in n for part in parts)}
    for name, parameter in model.named_parameters():
        if "shared_parameters.pal." in name or "pal_adapters.low." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
