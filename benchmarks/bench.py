"""Checks the bounds on time and memory, and prints each with what was measured and a verdict.

    python benchmarks/bench.py [--json OUT] [--write-docs docs/results/speed.md]
    python benchmarks/bench.py --quick                  # tiny sizes: only shows that everything runs
    python benchmarks/bench.py --device cuda            # bfloat16, eager and compiled
    python benchmarks/bench.py --only "peft pal" --json OUT    # bounds whose line contains the text; others stay

Each time is a ratio within one run: base, variant and base alternate, and the median over the rounds counts. The
command ends within `--minutes`: every bound has a share of the time that is left, and runs as many rounds as fit; a
CPU needs the default. Memory is counted exactly, from the tensors that a training step keeps.
`benchmarks/variants.py` compares more methods.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from speed import bases, mixed, report, small
from speed.measure import Bound, Measured, NotMeasured, Setting, released


def measure(bound: Bound, setting: Setting, seconds: float) -> Measured | str:
    """The value, or why there is none."""
    try:
        with released(setting):
            return bound.measure(setting, seconds)
    except NotMeasured as reason:
        return str(reason)
    except Exception as error:  # the other bounds are measured whatever fails in one, and the table says what failed
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def run(bounds: list[Bound], settings: list[Setting], minutes: float) -> list[report.Row]:
    """All lines of the table, within the time."""
    end = time.perf_counter() + 60 * minutes
    left = sum(bound.weight for bound in bounds) * len(settings)
    rows = []
    for bound in bounds:
        for setting in settings:
            spare = end - time.perf_counter()
            seconds = spare * bound.weight / left
            left -= bound.weight
            measured = measure(bound, setting, seconds) if spare > 0 else "no time left"
            rows.append(report.row_of(bound, measured, "compiled" if setting.compiled else "eager"))
            print(report.text(rows[-1:]).strip().replace("\n", "\n "), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for the results")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="page whose tables are replaced")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=45, help="the time for all bounds (45)")
    parser.add_argument("--only", nargs="*", help="texts, one of which a line has to contain")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no CUDA device.")
    torch.set_num_threads(1 if options.quick else 2)
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)  # warns as long as a model has adapters and none is active
    warnings.filterwarnings("ignore")
    every = [*mixed.bounds(), *small.bounds(), *bases.bounds()]
    bounds = [
        bound
        for bound in every
        if not options.only or any(text in f"{bound.what}: {bound.of}" for text in options.only)
    ]
    modes = (False, True) if options.device == "cuda" else (False,)
    settings = [Setting(options.device, options.quick, compiled) for compiled in modes]
    about: dict[str, Any] = {
        "versions": {package: version(package) for package in ("torch", "transformers", "adapters", "peft")},
        "machine": {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "sizes": "tiny" if options.quick else "whole",
        },
    }
    earlier: list[report.Row] = []
    if options.json and options.only and options.json.is_file():
        earlier = report.earlier_rows(options.json, about, every)
    rows = report.merged(earlier, run(bounds, settings, options.minutes), every)
    result = {**about, "bounds": rows}
    print(report.text(rows))
    verdicts = [row["verdict"].partition(":")[0] for row in rows if row["limit"] is not None]
    print("\n" + ", ".join(f"{verdicts.count(v)} {v}" for v in ("reached", "not reached", "not measured")))
    if options.json:
        report.write_json(options.json, result)
    if options.write_docs:
        report.write_docs(options.write_docs, result)


if __name__ == "__main__":
    main()
