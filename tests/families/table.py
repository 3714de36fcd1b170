"""Writes and reads the tables of `docs/models.md`.

`python -m tests.families.table` writes that of PEFT with transformers 5, and that of `adapters` where it is installed;
`--part 1/4` only prints the verdicts of a part.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import pathlib
import warnings
from collections.abc import Collection

import peft
import transformers

from tests.zoo import BY_NAME, V5, Host

from .checks import METHODS, verdict
from .more import MORE

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = """# Models

Which methods work on which model families, in PEFT. Each cell comes from a tiny random model: *yes* means that a
fresh adapter changes nothing, a random one does, every parameter gets a gradient, the base model stays as it is,
padding does not change real tokens, and generation gives the same result with and without a cache. A number is a
rejection, explained below. A second table is about [adapters](adapters.md).

For another model, `pal_adapters.describe_sites(model)` prints which blocks are found and what each method would do.
[Model types](model-types.md) tells what works on further types of transformers.

The table was made with transformers {transformers} and peft {peft} by `python -m tests.families.table`.
"""
ADAPTERS = "\n## In `adapters`\n"
_HEAD_OF_ADAPTERS = """
The same for the model classes of `adapters`, and for a model through its `AdapterModelInterface`. Generation is
tested elsewhere. The bottlenecks of that host are its Houlsby adapters.

The table was made with transformers {transformers} and adapters {adapters} by `python -m tests.families.table`.
"""


def families() -> list[Host]:
    """All families that the installed transformers has.

    The generation caches of transformers 4.57 have no place for the further layers of hybrids, so these come with 5.
    """
    hosts = (*BY_NAME.values(), *(MORE if V5 else ()))
    return sorted((host for host in hosts if host.available), key=str)


def render(verdicts: dict[tuple[str, str], str], methods: Collection[str] = METHODS) -> str:
    """A table and its footnotes for verdicts by family and method."""
    reasons = list(dict.fromkeys(v for v in verdicts.values() if v != "works"))
    rows = [["Family", *methods], ["---", *(":---:" for _ in methods)]]
    for family in dict.fromkeys(family for family, _ in verdicts):
        cells = [verdicts[family, method] for method in methods]
        rows.append([family, *("yes" if cell == "works" else str(reasons.index(cell) + 1) for cell in cells)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "\n".join(f"{i}. {reason.removeprefix('rejected: ')}" for i, reason in enumerate(reasons, 1))
    works = sum(v == "works" for v in verdicts.values())
    total = f"{works} of {len(verdicts)} combinations work; the others are rejected when the adapter is added."
    return f"{total}\n\n{table}\n\n### Rejections\n\n{notes}\n"


def recorded(host: str = "peft") -> dict[tuple[str, str], bool]:
    """Whether each method works on each family, as the page says."""
    of_peft, _, of_adapters = PAGE.read_text().partition(ADAPTERS)
    page = of_peft if host == "peft" else of_adapters
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    methods, rows = lines[0][1:], lines[2:]
    return {(row[0], method): cell == "yes" for row in rows for method, cell in zip(methods, row[1:], strict=True)}


def _of_peft() -> str:
    verdicts = {(str(h), method): verdict(h, method) for h in families() for method in METHODS}
    return f"{_HEAD.format(transformers=transformers.__version__, peft=peft.__version__)}\n{render(verdicts)}"


def _of_adapters() -> str:
    from . import in_adapters as classes  # where the host is installed

    verdicts = {(name, m): classes.verdict(name, m) for name in classes.NAMES for m in classes.METHODS}
    head = _HEAD_OF_ADAPTERS.format(
        transformers=transformers.__version__, adapters=importlib.metadata.version("adapters")
    )
    return f"{head}\n{render(verdicts, classes.METHODS)}"


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", help="such as 1/4: print the verdicts of a part and write nothing")
    part = parser.parse_args().part
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if part:
        number, parts = (int(n) for n in part.split("/"))
        for host in families()[number - 1 :: parts]:
            print("\n".join(f"{host}, {method}: {verdict(host, method)}" for method in METHODS), flush=True)
        return
    of_peft, _, of_adapters = PAGE.read_text().partition(ADAPTERS)
    if V5:
        of_peft = _of_peft()
    if any(importlib.metadata.distributions(name="adapters")):
        of_adapters = _of_adapters()
    PAGE.write_text(f"{of_peft}{ADAPTERS}{of_adapters}")


if __name__ == "__main__":
    main()
