"""Runs the claims and writes the table, the JSON and the pictures."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from pal_adapters.cli.main import reported
from pal_adapters.cli.options import parse
from pal_adapters.cli.shared import make_folder, versions, write_json
from pal_adapters.multitask.model.files import replace_text

from .options import ClaimsOptions
from .pictures import front, heat_maps
from .pieces import Pieces
from .plans import PLANS
from .report import report
from .runs import Runs
from .table import cells, table
from .training import Training, fingerprint


def run(args: ClaimsOptions, command: str) -> list[dict[str, Any]]:
    """Works until all is done or the budget is spent, and writes the results."""
    output = make_folder("--output_dir", args.output_dir)
    pieces = Pieces(output / "pieces", args.budget * 3600)
    training = Training(args.model, args.data_dir, args.device, output / "adapters")
    runs = Runs(args, pieces, fingerprint(args.model), training.digest, training.run)
    plans = {claim: PLANS[claim](args) for claim in args.claim}
    for lines in plans.values():
        runs.work(lines)
    found = {claim: [report(line, runs) for line in lines] for claim, lines in plans.items()}
    every = [line for lines in found.values() for line in lines]
    about = {"versions": versions(), "settings": args.settings() | {"tries": args.tries, "seeds": args.seeds}}
    write_json(output / "claims.json", about | {"command": command, "claims": found})
    replace_text(output / "table.md", table(every, command))
    for claim, lines in found.items():
        front(lines, output / f"{claim}.png")
        heat_maps(lines, output)
        replace_text(output / f"{claim}.md", "\n\n".join(f"{line['says']}:\n\n{cells(line)}" for line in lines) + "\n")
    return every


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    args, others = parse("claims.py", __doc__, given, ClaimsOptions)

    def work() -> int:
        command = shlex.join(["python", "benchmarks/claims.py", *given])
        print(table(run(args, command), command))
        return 0

    return reported("claims.py", work, traceback=others.traceback)
