"""Writes and reads the table of `docs/models.md`.

`python -m tests.families.table` runs all families and writes it; `--part 1/4` only prints the verdicts of a part.
"""

from __future__ import annotations

import argparse
import pathlib
import warnings

import peft
import transformers

from tests.zoo import BY_NAME, Host

from .checks import METHODS, verdict

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = """# Models

Which methods work on which model families, in PEFT. Each cell comes from a tiny random model: *yes* means that a
fresh adapter changes nothing, a random one does, every parameter gets a gradient, the base model stays as it is,
padding does not change real tokens, and generation gives the same with a cache and without. A number is a rejection,
explained below. In `adapters`, the methods support the classes of that host, see [adapters](adapters.md).

For another model, `pal_adapters.describe_sites(model)` prints which blocks are found and what each method would do.

The table was made with transformers {transformers} and peft {peft} by `python -m tests.families.table`.
"""


def families() -> list[Host]:
    """All families that the installed transformers has."""
    return sorted((host for host in BY_NAME.values() if host.available), key=str)


def render(verdicts: dict[tuple[str, str], str]) -> str:
    """The page for verdicts by family and method."""
    reasons = list(dict.fromkeys(v for v in verdicts.values() if v != "works"))
    rows = [["Family", *METHODS], ["---", *(":---:" for _ in METHODS)]]
    for family in dict.fromkeys(family for family, _ in verdicts):
        cells = [verdicts[family, method] for method in METHODS]
        rows.append([family, *("yes" if cell == "works" else str(reasons.index(cell) + 1) for cell in cells)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "\n".join(f"{i}. {reason.removeprefix('rejected: ')}" for i, reason in enumerate(reasons, 1))
    head = _HEAD.format(transformers=transformers.__version__, peft=peft.__version__)
    works = sum(v == "works" for v in verdicts.values())
    total = f"{works} of {len(verdicts)} combinations work, the others are rejected when the adapter is added."
    return f"{head}\n{total}\n\n{table}\n\n## Rejections\n\n{notes}\n"


def recorded() -> dict[tuple[str, str], bool]:
    """Whether each method works on each family, as the page says."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    methods, rows = lines[0][1:], lines[2:]
    return {(row[0], method): cell == "yes" for row in rows for method, cell in zip(methods, row[1:], strict=True)}


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", help="such as 1/4: print the verdicts of a part and write nothing")
    part = parser.parse_args().part
    number, parts = (int(n) for n in part.split("/")) if part else (1, 1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    verdicts = {(str(h), method): verdict(h, method) for h in families()[number - 1 :: parts] for method in METHODS}
    if part:
        print("\n".join(f"{family}, {method}: {value}" for (family, method), value in verdicts.items()))
    else:
        PAGE.write_text(render(verdicts))


if __name__ == "__main__":
    main()
