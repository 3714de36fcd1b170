"""Section 3: what the pretrained weights cost in memory and on disk, and adding, loading and saving many adapters."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters
import peft
import torch
from adapters.composition import Fuse
from safetensors.torch import load_file
from torch import nn

import pal_adapters

from .measure import Bound, Measured, Setting, interleaved, kept_bytes
from .mixed import lora

MIB = 2**20


def size_of(folder: Path) -> int:
    """Bytes on disk of a folder; a file with several names counts once."""
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())


def camtl_bytes(host: str, setting: Setting, seconds: float) -> Measured:
    """Bytes of the copies of a bfloat16 base over those of the originals."""
    base: Any = setting.bert("BERT-base").to(torch.bfloat16)
    if host == "peft":
        model: Any = peft.get_peft_model(base, pal_adapters.CAMTLPeftConfig(tasks=8))
    else:
        model = base
        adapters.init(model)
        model.add_adapter("all", config=pal_adapters.CAMTLConfig(tasks=8))
    copies = [p for n, p in model.named_parameters() if ".base." in n or ".outer." in n]
    used = sum(p.numel() * p.element_size() for p in copies)
    return Measured(used / (2 * sum(p.numel() for p in copies)))


def eight_bases(host: str, setting: Setting, seconds: float) -> Measured:
    """Bytes on disk of eight adapters saved with the same pretrained weights, over those of the weights alone."""
    base: Any = setting.bert("BERT-base")
    alone = sum(p.numel() * p.element_size() for p in base.parameters())
    names = [f"t{task}" for task in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        if host == "peft":
            make = functools.partial(pal_adapters.LowRankPeftConfig, train_base=True)
            model: Any = peft.get_peft_model(base, make(), adapter_name="t0")
            for name in names[1:]:
                model.add_adapter(name, make())
            added = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "low_rank" in n)
            model.save_pretrained(folder)
        else:
            adapters.init(base)
            for name in names:
                base.add_adapter(name, config=pal_adapters.LowRankConfig(train_base=True))
            added = sum(p.numel() * p.element_size() for p in base.parameters()) - alone
            base.save_all_adapters(folder)
        return Measured((size_of(Path(folder)) - added) / alone)


def loading(config: Callable[[], Any], setting: Setting, seconds: float) -> Measured:
    """Loading 200 adapters of PEFT from files over reading the files."""
    count = setting.count(200)
    model: Any = peft.get_peft_model(setting.bert("BERT-base"), config(), adapter_name="t0")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        first = Path(folder, "t0")
        folders = [Path(folder, f"t{number}") for number in range(count)]
        for other in folders[1:]:
            shutil.copytree(first, other)
        for one in folders:  # into the cache of the operating system
            load_file(one / "adapter_model.safetensors")
        start = time.perf_counter()
        for one in folders:
            load_file(one / "adapter_model.safetensors")
        reading = time.perf_counter() - start
        fresh = setting.bert("BERT-base")
        start = time.perf_counter()
        loaded = peft.PeftModel.from_pretrained(fresh, str(folders[0]), adapter_name="t0")
        for done, one in enumerate(folders[1:], start=1):
            loaded.load_adapter(str(one), adapter_name=one.name)
            if time.perf_counter() - start > 3 * seconds and not setting.quick:
                spent = time.perf_counter() - start
                ratio = spent / (reading * (done + 1) / count)
                return Measured(ratio, note=f"the first {done + 1} only: the time was up; later ones cost more")
        return Measured((time.perf_counter() - start) / reading)


def adding(host: str, config: Any, setting: Setting, seconds: float) -> Measured:
    """Adding the last of 200 adapters over adding the second, on a model of two blocks."""
    torch.manual_seed(0)
    model: Any = setting.bert("tiny")
    if host == "adapters":
        adapters.init(model)

    def add(number: int) -> float:
        nonlocal model
        start = time.perf_counter()
        if host == "adapters":
            model.add_adapter(f"t{number}", config=config)
        elif number == 0:
            model = peft.get_peft_model(model, config(), adapter_name="t0")
        else:
            model.add_adapter(f"t{number}", config())
        return time.perf_counter() - start

    times = [add(number) for number in range(setting.count(200, 12))]
    early, late = sorted(times[1:6])[2], sorted(times[-5:])[2]
    return Measured(late / early)


def saving(host: str, setting: Setting, seconds: float) -> Measured:
    """Growth of the resident set while an adapter is saved with its base, over the size of the base."""
    command = [sys.executable, "-m", "speed.bases", host, "quick" if setting.quick else "whole"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=root)
    return Measured(float(done.stdout.split()[-1]))


def resident(kind: str) -> int:
    """Bytes of resident memory of this process, now ("VmRSS") or at its peak ("VmHWM"). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def measure_saving(host: str, setting: Setting) -> float:
    """See `saving`; in a process of its own."""
    base: Any = setting.bert("BERT-base")
    alone = sum(p.numel() * p.element_size() for p in base.parameters())
    with tempfile.TemporaryDirectory() as folder:
        if host == "peft":
            model: Any = peft.get_peft_model(base, pal_adapters.LowRankPeftConfig(train_base=True))
            save: Callable[[], Any] = functools.partial(model.save_pretrained, folder)
        else:
            adapters.init(base)
            base.add_adapter("t", config=pal_adapters.LowRankConfig(train_base=True))
            save = functools.partial(base.save_adapter, folder, "t")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        save()
        return (resident("VmHWM") - before) / alone


def scalearn(count: int, setting: Setting) -> nn.Module:
    """ScaLearn over this many frozen sources."""
    model: Any = setting.bert("BERT-base")
    adapters.init(model)
    names = [f"s{number}" for number in range(count)]
    for name in names:
        model.add_adapter(name, config="seq_bn")
    model.add_adapter_fusion(Fuse(*names), config="scalearn")
    model.train_adapter_fusion(Fuse(*names))
    return model


def camtl(count: int, setting: Setting) -> nn.Module:
    """CA-MTL with this many tasks."""
    return peft.get_peft_model(setting.bert("BERT-base"), pal_adapters.CAMTLPeftConfig(tasks=count))


def joint(count: int, setting: Setting) -> nn.Module:
    """PALs with the pretrained weights trained as well."""
    make = functools.partial(pal_adapters.PALPeftConfig, train_base=True)
    model: Any = peft.get_peft_model(setting.bert("BERT-base"), make(), adapter_name="t0")
    for number in range(1, count):
        model.add_adapter(f"t{number}", make())
    return model


def step_memory(build: Callable[[int, Setting], Any], count: int, setting: Setting, seconds: float) -> Measured:
    """MiB of a training step: kept for the backward pass, gradients, and the two moments of Adam."""
    model = build(setting.count(count), setting)
    setting.place(model).train()
    batch: dict[str, Any] = setting.batch(16, 64)
    if build is camtl:
        batch["task_ids"] = torch.arange(16) % setting.count(count)
    trained = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept = kept_bytes(model, functools.partial(model, **batch))
    return Measured((kept + trained) / MIB, note=f"{kept / MIB:.0f} kept, {trained / MIB:.0f} gradients and Adam")


def heads_padded(setting: Setting, seconds: float) -> Measured:
    """A PAL's attention with heads of 40 channels, zero-padded, over that with its 34."""
    shape = (16, 6, setting.tokens(64), 34)
    q, k, v = (torch.randn(shape, device=setting.device, dtype=setting.dtype) for _ in range(3))

    def plain() -> None:
        nn.functional.scaled_dot_product_attention(q, k, v, scale=34**-0.5)

    def padded() -> None:
        wide = (nn.functional.pad(t, (0, 6)) for t in (q, k, v))
        nn.functional.scaled_dot_product_attention(*wide, scale=34**-0.5)[..., :34]

    return interleaved(plain, padded, min(seconds, 2.0), setting)


def bounds() -> Iterator[Bound]:
    """All bounds of this section."""
    what = "bytes of CA-MTL's copies / of the originals, bfloat16"
    for host in ("adapters", "peft"):
        yield Bound(3, what, host, 1.0, functools.partial(camtl_bytes, host), 0.5, floor=1.0)
    what = "on disk: eight adapters with train_base, without their own weights / the base, BERT-base size"
    for host in ("adapters", "peft"):
        yield Bound(3, what, host, 1.02, functools.partial(eight_bases, host), 1.0, floor=1.0)
    what = "peak while saving with train_base, beyond the model / the base"
    for host in ("adapters", "peft"):
        yield Bound(3, what, host, 1.0, functools.partial(saving, host), 1.5)
    what = "loading 200 adapters / reading their files, BERT-base size"
    yield Bound(3, what, "peft pal", 1.2, functools.partial(loading, pal_adapters.PALPeftConfig), 3.0, floor=1.0)
    yield Bound(3, what, "peft lora (host)", None, functools.partial(loading, lora), 1.5)
    what = "adding the 200th adapter / the second, two blocks"
    yield Bound(3, what, "adapters pal", 1.2, functools.partial(adding, "adapters", "pal"), 1.0, floor=1.0)
    yield Bound(
        3, what, "peft pal", 1.2, functools.partial(adding, "peft", pal_adapters.PALPeftConfig), 1.0, floor=1.0
    )
    yield Bound(3, what, "adapters seq_bn (host)", None, functools.partial(adding, "adapters", "seq_bn"), 0.7)
    yield Bound(3, what, "peft lora (host)", None, functools.partial(adding, "peft", lora), 0.7)
    what = "training step, BERT-base size, 16 x 64 tokens"
    for name, build in (("peft pal, train_base", joint), ("peft ca_mtl", camtl), ("adapters scalearn", scalearn)):
        for count in (1, 8, 32):
            of = f"{name}, {count} {'sources' if build is scalearn else 'tasks'}"
            yield Bound(3, what, of, None, functools.partial(step_memory, build, count), 0.7, unit="MiB")
    yield Bound(3, "attention of a PAL, heads padded 34 to 40 / not, 16 x 64 tokens", "", None, heads_padded, 0.2)


if __name__ == "__main__":
    print(measure_saving(sys.argv[1], Setting(quick=sys.argv[2] == "quick")))
