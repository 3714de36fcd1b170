"""Verdicts on the papers' claims from the short runs in `docs/results/`, which have scores by seed but no predictions.

    python benchmarks/short_claims.py --json docs/results/short_claims.json --picture docs/images/short_claims.png

`claims.py` runs the claims anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claims.options import ClaimsOptions
from claims.pictures import front
from claims.plans import PLANS
from claims.short import read, report
from claims.table import table

TASKS = ["rte", "mrpc", "stsb", "cola", "sst2", "qnli"]
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def lines() -> dict[str, list[dict[str, Any]]]:
    """The lines of each claim."""
    many, transfer = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("many_tasks", "transfer")
    )
    found = read(many, transfer)
    args = ClaimsOptions("", houlsby_tasks=TASKS, joint_tasks=TASKS, targets=["copa", "rte", "mrpc"], shots=[])
    return {claim: [report(line, found) for line in plan(args)] for claim, plan in PLANS.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the data of the table")
    parser.add_argument("--picture", type=Path, help="file for the plot of scores against trained parameters")
    options = parser.parse_args(argv)
    found = lines()
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        front([line for claim in ("houlsby", "pals", "ca_mtl") for line in found[claim]], options.picture)
    print(table([line for some in found.values() for line in some]))


if __name__ == "__main__":
    main()
