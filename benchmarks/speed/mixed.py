"""Section 1: examples of many tasks in one batch, compared with the same examples of a single task."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import adapters
import peft
import torch
from adapters.composition import BatchSplit, MultiTask

import pal_adapters

from .measure import Bound, Measured, Setting, forward, interleaved, kept_bytes, training

Inputs = dict[str, Any]


class Pair:
    """A model with the inputs of a mixed batch and of a batch of one task.

    Args:
        model: with adapters `t0`, `t1`, ...
        mixed, one: the inputs.
        before_mixed, before_one: what is active.
    """

    def __init__(
        self,
        model: Any,
        mixed: Inputs,
        one: Inputs,
        before_mixed: Callable[[], Any] = lambda: None,
        before_one: Callable[[], Any] = lambda: None,
    ) -> None:
        self.model = model
        self.inputs = (one, mixed)
        self.before = (before_one, before_mixed)

    def steps(self, setting: Setting, run: Callable[[Any, Inputs], None]) -> tuple[Callable[[], None], ...]:
        """The step with one task and the mixed one."""
        called = setting.call(self.model)

        def step(which: int) -> None:
            self.before[which]()
            run(called, self.inputs[which])

        return functools.partial(step, 0), functools.partial(step, 1)

    def kept(self) -> float:
        """How much more a mixed training step keeps for its backward pass than one with a single task."""
        amounts = []
        for before, inputs in zip(self.before, self.inputs, strict=True):
            before()
            amounts.append(kept_bytes(self.model, functools.partial(self.model, **inputs)))
        return amounts[1] / amounts[0]


def names_of(tasks: int, rows: int) -> list[str]:
    """Equal numbers of examples per task, shuffled."""
    names = [f"t{row % tasks}" for row in range(rows)]
    random.Random(0).shuffle(names)
    return names


def in_adapters(config: Any, setting: Setting, size: str, tasks: int, rows: int, tokens: int) -> Pair:
    """`MultiTask` with `task_ids` in `adapters`."""
    model: Any = setting.bert(size)
    adapters.init(model)
    children = [f"t{task}" for task in range(tasks)]
    for name in children:
        model.add_adapter(name, config=config)
    model.train_adapter(MultiTask(*children))
    setting.place(model).train()
    batch = setting.batch(rows, tokens)
    ids = torch.tensor([children.index(name) for name in names_of(tasks, rows)])
    return Pair(
        model,
        {**batch, "task_ids": ids},
        batch,
        lambda: model.set_active_adapters(MultiTask(*children)),
        lambda: model.set_active_adapters("t0"),
    )


def batch_split(config: Any, setting: Setting, size: str, tasks: int, rows: int, tokens: int) -> Pair:
    """The host's own mixed batches, in which examples have to be in the order of their tasks."""
    pair = in_adapters(config, setting, size, tasks, rows, tokens)
    split = BatchSplit(*[f"t{task}" for task in range(tasks)], batch_sizes=[rows // tasks] * tasks)
    pair.inputs = (pair.inputs[0], pair.inputs[0])
    pair.before = (pair.before[0], lambda: pair.model.set_active_adapters(split))
    return pair


def in_peft(config: Callable[[], Any], setting: Setting, size: str, tasks: int, rows: int, tokens: int) -> Pair:
    """`adapter_names` in PEFT."""
    model: Any = peft.get_peft_model(setting.bert(size), config(), adapter_name="t0")
    for task in range(1, tasks):
        model.add_adapter(f"t{task}", config())
    for name, parameter in model.named_parameters():
        if any(f".t{task}." in name for task in range(tasks)):
            parameter.requires_grad_(True)
    # LoRA rejects `adapter_names` in training mode.
    setting.place(model).train(config is not lora)
    batch = setting.batch(rows, tokens)
    return Pair(model, {**batch, "adapter_names": names_of(tasks, rows)}, batch)


def camtl(host: str, setting: Setting, size: str, tasks: int, rows: int, tokens: int) -> Pair:
    """One network with the tasks of the examples as `task_ids`."""
    model: Any = setting.bert(size)
    if host == "peft":
        model = peft.get_peft_model(model, pal_adapters.CAMTLPeftConfig(tasks=tasks))
    else:
        adapters.init(model)
        model.add_adapter("all", config=pal_adapters.CAMTLConfig(tasks=tasks))
        model.train_adapter("all")
    setting.place(model).train()
    batch = setting.batch(rows, tokens)
    ids = torch.tensor([int(name[1:]) for name in names_of(tasks, rows)])
    return Pair(model, {**batch, "task_ids": ids}, {**batch, "task_ids": torch.zeros_like(ids)})


def lora() -> peft.LoraConfig:
    """PEFT's own method."""
    return peft.LoraConfig(r=8, target_modules=["query", "value"], lora_alpha=16)


Build = Callable[[Setting, str, int, int, int], Pair]
OURS: dict[str, Build] = {
    "adapters pal": functools.partial(in_adapters, "pal"),
    "peft pal": functools.partial(in_peft, pal_adapters.PALPeftConfig),
    "adapters low_rank": functools.partial(in_adapters, "low_rank"),
    "peft low_rank": functools.partial(in_peft, pal_adapters.LowRankPeftConfig),
    "adapters parallel_houlsby": functools.partial(in_adapters, "parallel_houlsby"),
    "peft houlsby": functools.partial(in_peft, pal_adapters.HoulsbyPeftConfig),
}
NETWORKS: dict[str, Build] = {
    "adapters ca_mtl": functools.partial(camtl, "adapters"),
    "peft ca_mtl": functools.partial(camtl, "peft"),
}
MORE: dict[str, Build] = {
    "adapters houlsby_pal": functools.partial(in_adapters, "houlsby_pal"),
    "peft houlsby_pal": functools.partial(in_peft, pal_adapters.HoulsbyPALPeftConfig),
    "peft parallel_houlsby": functools.partial(in_peft, pal_adapters.ParallelHoulsbyPeftConfig),
    "adapters lhuc": functools.partial(in_adapters, "lhuc"),
    "peft lhuc": functools.partial(in_peft, pal_adapters.LHUCPeftConfig),
    "adapters top_attention": functools.partial(in_adapters, "top_attention"),
    "peft top_attention": functools.partial(in_peft, pal_adapters.TopAttentionPeftConfig),
    "adapters top_bert_layer": functools.partial(in_adapters, "top_bert_layer"),
    "peft top_bert_layer": functools.partial(in_peft, pal_adapters.TopBertLayerPeftConfig),
    **NETWORKS,
}
PEERS: dict[str, Build] = {
    "adapters double_seq_bn, BatchSplit (host)": functools.partial(batch_split, "double_seq_bn"),
    "peft lora (host)": functools.partial(in_peft, lora),
}


def step_ratio(build: Build, size: str, rows: int, tokens: int, setting: Setting, seconds: float) -> Measured:
    """A training step of 8 tasks over one of a single task."""
    pair = build(setting, size, 8, rows, tokens)
    return interleaved(*pair.steps(setting, training), seconds, setting)


def forward_ratio(build: Build, tasks: int, rows: int, setting: Setting, seconds: float) -> Measured:
    """A forward pass of many tasks over one of a single task."""
    pair = build(setting, "MiniLM", tasks, rows, 64)
    pair.model.eval()
    return interleaved(*pair.steps(setting, forward), seconds, setting)


def memory_ratio(build: Build, setting: Setting, seconds: float) -> Measured:
    """What a training step of 8 tasks keeps for its backward pass over one of a single task."""
    return Measured(build(setting, "MiniLM", 8, 32, 32).kept())


def products(inner: int, outer: int, rows: int, tokens: int, setting: Setting, seconds: float) -> Measured:
    """The bare products of eight tasks over that of one, forward and backward, for a weight `[outer, inner]`."""
    tokens = setting.tokens(tokens)
    x = torch.randn(rows, tokens, inner, device=setting.device, dtype=setting.dtype, requires_grad=True)
    weights = [
        torch.randn(outer, inner, device=setting.device, dtype=setting.dtype, requires_grad=True) for _ in range(8)
    ]

    def run(count: int) -> None:
        parts = zip(x.split(rows // count), weights, strict=False)
        y = torch.cat([torch.nn.functional.linear(part, weight) for part, weight in parts])
        torch.autograd.grad(y, [x, *weights[:count]], torch.ones_like(y))

    return interleaved(functools.partial(run, 1), functools.partial(run, 8), seconds, setting, most=201)


def bounds() -> Iterator[Bound]:
    """All bounds of this section, the most important first."""
    for size, rows, tokens, limit, of, weight in (
        ("MiniLM", 32, 32, 1.06, {**OURS, **MORE}, 1.0),
        ("MiniLM", 32, 128, 1.04, {**OURS, **MORE}, 2.0),
        ("BERT-base", 16, 32, 1.06, {**OURS, **NETWORKS}, 3.0),
        ("BERT-base", 16, 128, 1.04, {**OURS, **NETWORKS}, 8.0),
    ):
        what = f"training step, 8 tasks / 1 task, {size} size, {rows} x {tokens} tokens"
        for name, build in of.items():
            measure = functools.partial(step_ratio, build, size, rows, tokens)
            yield Bound(1, what, name, limit, measure, weight, floor=1.0)
        for name, build in PEERS.items():
            measure = functools.partial(step_ratio, build, size, rows, tokens)
            yield Bound(1, what, name, None, measure, weight / 2)
    what = "kept for the backward pass, 8 tasks / 1 task, MiniLM size, 32 x 32 tokens"
    for name, build in {**OURS, **MORE, **PEERS}.items():
        limit = None if name in PEERS else 1.1
        yield Bound(1, what, name, limit, functools.partial(memory_ratio, build), 0.3, floor=1.0)
    what = "forward pass, 64 tasks / 1 task, MiniLM size, 64 x 64 tokens"
    for name, build in {**OURS, **PEERS}.items():
        limit = None if name in PEERS else 1.15
        yield Bound(1, what, name, limit, functools.partial(forward_ratio, build, 64, 64), 2.0, floor=1.0)
    what = "bare products of torch, 8 tasks / 1 task, forward and backward, {rows} x {tokens} tokens"
    for rows, tokens in ((32, 32), (32, 128), (16, 32), (16, 128)):
        widths = ((126, 126), (384, 126), (384, 1536)) if rows == 32 else ((204, 204), (768, 204))
        for inner, outer in widths:
            measure = functools.partial(products, inner, outer, rows, tokens)
            yield Bound(1, what.format(rows=rows, tokens=tokens), f"{inner} to {outer}", None, measure, 0.1)
