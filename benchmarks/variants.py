"""Speed and memory compared with the hosts' own methods, as ratios within one run.

    python benchmarks/variants.py --json OUT [--rounds N] [--only NAME ...]

BERT-base size, random weights, 16 x 64 tokens, two threads. Each variant runs once per round; its time is divided by
that of the plain frozen model's forward pass in the same round, and the median over the rounds is reported. Memory is
the growth of the resident set during one training step, measured in a separate process for each variant.

Mixed batches compare one forward pass over examples of many tasks with one over the same examples and a single task.
The part `camtl` does this for CA-MTL with 8 tasks and 16 x 128 tokens, and also compares with the plain model.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adapters
import peft
import torch
import transformers
from adapters.composition import BatchSplit, Fuse, MultiTask
from tqdm import tqdm
from transformers import BertConfig, BertModel

import pal_adapters

BERT_BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
MINILM = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
Inputs = dict[str, torch.Tensor]


def bert(size: dict[str, int]) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=1000, **size)).eval()
    model.requires_grad_(False)
    return model


def inputs(batch: int, tokens: int) -> Inputs:
    ids = torch.randint(1000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_adapters(config: Any, size: dict[str, int] = BERT_BASE, tasks: int = 1) -> BertModel:
    model = bert(size)
    adapters.init(model)
    for task in range(tasks):
        model.add_adapter(f"t{task}", config=config)
    model.train_adapter("t0")
    return model


def with_fusion(config: str, *, folded: bool = False) -> BertModel:
    """Eight frozen sources of size 48 and their combination."""
    model = bert(BERT_BASE)
    adapters.init(model)
    names = [f"s{i}" for i in range(8)]
    for name in names:
        model.add_adapter(name, config="seq_bn")
    model.add_adapter_fusion(Fuse(*names), config=config)
    if not folded:
        model.train_adapter_fusion(Fuse(*names))
        return model
    pal_adapters.fold(model, Fuse(*names), name="folded")
    model.delete_adapter_fusion(Fuse(*names))
    for name in names:
        model.delete_adapter(name)
    model.train_adapter("folded")
    return model


def with_peft(config: Callable[[], Any], size: dict[str, int] = BERT_BASE, tasks: int = 1) -> Any:
    model = peft.get_peft_model(bert(size), config(), adapter_name="t0")
    for task in range(1, tasks):
        model.add_adapter(f"t{task}", config())
    return model


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=8, target_modules=["query", "value"], lora_alpha=16)


def houlsby_16() -> peft.PeftConfig:
    """The equivalent of `seq_bn` in `adapters`: after the feed-forward network of each block, reduction factor 16."""
    return pal_adapters.HoulsbyPeftConfig(
        hidden_size=BERT_BASE["hidden_size"] // 16,
        target_modules=r".*layer\.\d+\.output\.dropout",
        train_layernorm=False,
    )


def with_combination(source: Callable[[], Any], *, folded: bool = False, merged: bool = False) -> Any:
    """ScaLearn over eight frozen sources from disk, or its folded or merged form."""
    with tempfile.TemporaryDirectory() as folder:
        sources = peft.get_peft_model(bert(BERT_BASE), source(), adapter_name="s0")
        for index in range(1, 8):
            sources.add_adapter(f"s{index}", source())
        sources.save_pretrained(folder)
        paths = {f"s{index}": f"{folder}/s{index}" for index in range(8)}
        model = peft.get_peft_model(bert(BERT_BASE), pal_adapters.ScaLearnPeftConfig(adapters=paths))
    if not folded:
        return model
    model = pal_adapters.fold(model)
    return model.merge_and_unload() if merged else model


VARIANTS: dict[str, Callable[[], Any]] = {
    "plain": lambda: bert(BERT_BASE),
    "adapters pal": lambda: with_adapters("pal"),
    "adapters low_rank": lambda: with_adapters("low_rank"),
    "adapters parallel_houlsby": lambda: with_adapters("parallel_houlsby"),
    "adapters seq_bn (host)": lambda: with_adapters("seq_bn"),
    "adapters double_seq_bn (host)": lambda: with_adapters("double_seq_bn"),
    "adapters fusion of 8 (host)": lambda: with_fusion("dynamic"),
    "adapters scalearn of 8": lambda: with_fusion("scalearn"),
    "adapters scalearn_uniform_pp of 8": lambda: with_fusion("scalearn_uniform_pp"),
    "adapters scalearn of 8, folded": lambda: with_fusion("scalearn", folded=True),
    "peft pal": lambda: with_peft(pal_adapters.PALPeftConfig),
    "peft low_rank": lambda: with_peft(pal_adapters.LowRankPeftConfig),
    "peft houlsby": lambda: with_peft(pal_adapters.HoulsbyPeftConfig),
    "peft houlsby, norms frozen": lambda: with_peft(lambda: pal_adapters.HoulsbyPeftConfig(train_layernorm=False)),
    "peft lora (host)": lambda: with_peft(lora),
    "peft scalearn of 8 houlsby": lambda: with_combination(houlsby_16),
    "peft scalearn of 8 houlsby, folded": lambda: with_combination(houlsby_16, folded=True),
    "peft scalearn of 8 lora": lambda: with_combination(lora),
    "peft scalearn of 8 lora, folded": lambda: with_combination(lora, folded=True),
    "peft scalearn of 8 lora, merged": lambda: with_combination(lora, folded=True, merged=True),
}


def forward(model: Any, batch: Inputs) -> float:
    model.eval()
    start = time.perf_counter()
    with torch.no_grad():
        model(**batch)
    return time.perf_counter() - start


def train_step(model: Any, batch: Inputs) -> float:
    model.train()
    start = time.perf_counter()
    model(**batch).last_hidden_state.square().mean().backward()
    elapsed = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return elapsed


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def rounds(measure: dict[str, Callable[[], float]], reference: str, count: int) -> dict[str, dict[str, float]]:
    """The median ratio to the reference in the same round, with the quartiles."""
    for function in measure.values():
        function()
    ratios: dict[str, list[float]] = {name: [] for name in measure}
    order = list(measure)
    for index in tqdm(range(count), desc=f"rounds against {reference}"):
        random.Random(index).shuffle(order)
        seconds = {name: measure[name]() for name in order}
        for name, value in seconds.items():
            ratios[name].append(value / seconds[reference])
    table = {}
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        table[name] = {"ratio": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}
    return table


def single_task(names: list[str], count: int) -> dict[str, Any]:
    batch = inputs(16, 64)
    models = {name: VARIANTS[name]() for name in dict.fromkeys(["plain", *names])}
    measure = {f"{name} | forward": lambda m=model: forward(m, batch) for name, model in models.items()}
    measure |= {
        f"{name} | step": lambda m=model: train_step(m, batch) for name, model in models.items() if trainable(model)
    }
    table = rounds(measure, "plain | forward", count)
    result: dict[str, Any] = {}
    for key, value in table.items():
        name, kind = key.split(" | ")
        result.setdefault(name, {})[kind] = value
        result[name]["trainable"] = trainable(models[name])
    return result


def _adapters_mixed(config: Any, size: dict[str, int], tasks: int, names: list[str], batch: Inputs) -> dict[str, Any]:
    model = with_adapters(config, size, tasks)
    children = [f"t{i}" for i in range(tasks)]
    ids = torch.tensor([children.index(n) for n in names])

    def mixed() -> float:
        model.set_active_adapters(MultiTask(*children))
        return forward(model, {**batch, "task_ids": ids})

    def one() -> float:
        model.set_active_adapters("t0")
        return forward(model, batch)

    return {"mixed": mixed, "one": one}


def _batch_split(config: Any, size: dict[str, int], tasks: int, names: list[str], batch: Inputs) -> dict[str, Any]:
    model = with_adapters(config, size, tasks)
    each = len(names) // tasks

    def mixed() -> float:
        model.set_active_adapters(BatchSplit(*[f"t{i}" for i in range(tasks)], batch_sizes=[each] * tasks))
        return forward(model, batch)

    def one() -> float:
        model.set_active_adapters("t0")
        return forward(model, batch)

    return {"mixed": mixed, "one": one}


def _peft_mixed(config: Any, size: dict[str, int], tasks: int, names: list[str], batch: Inputs) -> dict[str, Any]:
    model = with_peft(config, size, tasks)
    return {
        "mixed": lambda: forward(model, {**batch, "adapter_names": names}),  # type: ignore[dict-item]
        "one": lambda: forward(model, batch),
    }


MIXED: dict[str, tuple[Callable[..., dict[str, Any]], Any]] = {
    "adapters pal MultiTask": (_adapters_mixed, "pal"),
    "adapters low_rank MultiTask": (_adapters_mixed, "low_rank"),
    "peft pal adapter_names": (_peft_mixed, pal_adapters.PALPeftConfig),
    "peft low_rank adapter_names": (_peft_mixed, pal_adapters.LowRankPeftConfig),
    "peft houlsby adapter_names": (_peft_mixed, pal_adapters.HoulsbyPeftConfig),
    "adapters double_seq_bn BatchSplit (host)": (_batch_split, "double_seq_bn"),
    "peft lora adapter_names (host)": (_peft_mixed, lora),
}


def mixed_batches(size: dict[str, int], tasks: int, rows: int, count: int, only: list[str] | None) -> dict[str, Any]:
    batch = inputs(rows, 64)
    names = [f"t{i % tasks}" for i in range(rows)]
    random.Random(0).shuffle(names)
    result = {}
    for label, (build, config) in MIXED.items():
        if only and label not in only:
            continue
        table = rounds(build(config, size, tasks, names, batch), "one", count)
        result[label] = table["mixed"]
    return result


def ca_mtl(count: int, host: str) -> dict[str, Any]:
    """CA-MTL with 8 tasks: a mixed batch of 16 x 128 tokens relative to the plain model and to a batch of one task."""
    batch = inputs(16, 128)
    plain = bert(BERT_BASE)
    if host == "peft":
        model: Any = peft.get_peft_model(bert(BERT_BASE), pal_adapters.CAMTLPeftConfig(tasks=8))
    else:
        model = bert(BERT_BASE)
        adapters.init(model)
        model.add_adapter("all", config=pal_adapters.CAMTLConfig(tasks=8))
        model.set_active_adapters("all")
    mixed, one = torch.arange(16) % 8, torch.zeros(16, dtype=torch.long)
    measure = {
        "plain": lambda: forward(plain, batch),
        "mixed": lambda: forward(model, {**batch, "task_ids": mixed}),
        "one": lambda: forward(model, {**batch, "task_ids": one}),
    }
    beside_plain = rounds(measure, "plain", count)["mixed"]
    del measure["plain"]
    return {"mixed / plain": beside_plain, "8 tasks / 1 task": rounds(measure, "one", count)["mixed"]}


def peak_memory(name: str) -> float:
    """MiB by which the resident set grows in one training step, in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", name], capture_output=True, text=True, check=True, timeout=600
    )
    return float(done.stdout.splitlines()[-1])


def measure_memory(name: str) -> None:
    torch.set_num_threads(2)
    model, batch = VARIANTS[name](), inputs(16, 64)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak; `ru_maxrss` would include the parent's
    before = resident("VmRSS")
    train_step(model, batch) if trainable(model) else forward(model, batch)
    print((resident("VmHWM") - before) / 1024)


def resident(kind: str) -> int:
    """KiB of resident memory of this process, now ("VmRSS") or at its peak ("VmHWM"). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="OUT", help="file for the results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", help="variants to measure")
    parser.add_argument("--parts", nargs="*", default=["single", "mixed8", "mixed32", "mixed64", "camtl", "memory"])
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options.memory_of)
        return
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    # The host warns as long as a model has adapters and none is active.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    names = [n for n in VARIANTS if not options.only or n in options.only]
    result: dict[str, Any] = {
        "versions": {p: version(p) for p in ("torch", "transformers", "adapters", "peft")},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "rounds": options.rounds,
    }

    def keep(part: str, found: dict[str, Any]) -> None:
        for name, row in found.items():
            result.setdefault(part, {}).setdefault(name, {}).update(row)
        if options.json:  # after each part, so that an interrupted run keeps its results
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n")

    if "single" in options.parts:
        keep("single", single_task(names, options.rounds))
    if "memory" in options.parts:
        keep("single", {name: {"peak_mib": round(peak_memory(name), 1)} for name in tqdm(names, desc="memory")})
    for part, size, tasks, rows in (
        ("mixed8", BERT_BASE, 8, 16),
        ("mixed32", MINILM, 32, 32),
        ("mixed64", MINILM, 64, 64),
    ):
        if part in options.parts:
            keep(part, mixed_batches(size, tasks, rows, options.rounds, options.only))
    if "camtl" in options.parts:
        for host in ("peft", "adapters"):
            keep("camtl", {f"{host} {name}": row for name, row in ca_mtl(options.rounds, host).items()})
    for name, row in result.get("single", {}).items():
        step = row.get("step", {}).get("ratio", float("nan"))
        line = f"{name:36} forward {row.get('forward', {}).get('ratio', float('nan')):6.3f}  step {step:6.3f}"
        print(f"{line}  peak {row.get('peak_mib', float('nan')):8.1f} MiB  trainable {row.get('trainable', 0):,}")
    for part in ("mixed8", "mixed32", "mixed64"):
        for name, row in result.get(part, {}).items():
            print(f"{part} {name:44} {row['ratio']:6.3f} ({row['q1']:.3f} to {row['q3']:.3f})")
    for name, row in result.get("camtl", {}).items():
        print(f"camtl {name:28} {row['ratio']:6.3f} ({row['q1']:.3f} to {row['q3']:.3f})")


if __name__ == "__main__":
    main()
