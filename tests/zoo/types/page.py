"""The page of all model types, made from the verdicts in `results/`."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Collection

from .sweep import RESULTS, Row, read

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "model-types.md"
_HEAD = """# Model types

What works on the model types of transformers {transformers}, with peft {peft}. [Models](models.md) has all methods on
the families that people adapt most. Here the types that the auto classes know are built tiny and random from their
configs, and three methods are tried on each: PALs, which attend, LHUC, which does not, and CA-MTL, which steers whole
blocks.

*Yes* means that a fresh adapter changes nothing and a random one does, that disabling it gives the base model back,
bit for bit, that it is loaded equal, that every parameter gets a gradient and a step leaves the base model alone; and
that padding, later tokens (in a causal model) and a generation cache change nothing, if they change nothing in the
model itself. *In part* means that CA-MTL rejects the type and names a part of it to switch off (`attention_layers=[]`,
`norm_layers=[]` or `bottleneck="none"`), without which the rest works. *No* is a rejection when the adapter is added.

Made with `python -m tests.zoo.types --part 1/6` and so on for all parts, then `--page`. Each part holds every sixth
type; types that have a verdict are not tried again.
"""
_MARK = {"works": "yes", "in part": "in part", "rejected": "no"}


def _kind(row: Row, method: str) -> str:
    return row["verdicts"][method]["kind"]


def _share(rows: Collection[Row], works: Callable[[Row], bool]) -> str:
    good = sum(map(works, rows))
    return f"{good} of {len(rows)} ({100 * good / max(1, len(rows)):.1f} %)"


def _short(row: Row, method: str) -> str:
    """The reason of a rejection, without what differs from type to type."""
    reason = row["verdicts"][method].get("reason", "")
    reason = reason.partition(" Use a method")[0].partition("; or pass ")[0].partition(": choose one")[0]
    reason = re.sub(r"^\w+ cannot be adapted by itself: ", "", reason).replace(row["class"], "the model")
    return re.sub(r"(?<= to )[\w.]+\.\d+(?=:)", "a block", reason).rstrip(".")


def _left(rows: Collection[Row], method: str) -> str:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if _kind(row, method) not in ("works", "in part"):
            reasons.setdefault(_short(row, method), []).append(row["type"])
    lines = [f"- {', '.join(types)}: {reason}." for reason, types in sorted(reasons.items(), key=lambda item: item[1])]
    return "\n".join(lines) or "None."


def render() -> str:
    """The page's text."""
    rows = [row for _, row in sorted(read().items())]
    built = [row for row in rows if "verdicts" in row]
    attending = [row for row in built if row["attends"]]
    single = [row for row in attending if row["stacks"] <= 1]
    faults = [
        f"{row['type']}, {name}: {found['kind']} ({found.get('reason', '')})"
        for row in built
        for name, found in row["verdicts"].items()
        if found["kind"] not in _MARK
    ]
    pals = _share(attending, lambda row: _kind(row, "PAL") == "works")
    whole = _share(single, lambda row: _kind(row, "CA-MTL") == "works")
    with_parts = _share(single, lambda row: _kind(row, "CA-MTL") in ("works", "in part"))
    versions = json.loads(next(iter(sorted(RESULTS.glob("*.json")))).read_text())["versions"]
    counts = "\n".join(
        [
            "| Question | Types |",
            "| --- | --- |",
            f"| Tried so far, of all types | {len(rows)} of {versions['types']} |",
            f"| Built from their configs, of those tried | {_share(rows, lambda row: 'verdicts' in row)} |",
            f"| PALs, of types with attention in their blocks | {pals} |",
            f"| LHUC, of all types that were built | {_share(built, lambda row: _kind(row, 'LHUC') == 'works')} |",
            f"| CA-MTL, of types with attention and one stack | {whole}, with parts switched off {with_parts} |",
            f"| Wrong values, crashes, rejections after the adapter was added | {len(faults)} |",
        ]
    )
    table = ["| Type | PAL | LHUC | CA-MTL |", "| --- | :---: | :---: | :---: |"]
    for row in built:
        marks = [_MARK.get(_kind(row, name), _kind(row, name)) for name in ("PAL", "LHUC", "CA-MTL")]
        table.append(f"| {row['type']} | {' | '.join(marks)} |")
    missing = "\n".join(f"- {row['type']}: {_plain_text(row['not_built'])}" for row in rows if "verdicts" not in row)
    parts = [
        _HEAD.format(**versions),
        counts,
        *(["## Faults", "\n".join(f"- {fault}" for fault in faults)] if faults else []),
        "## PALs are rejected by",
        "Types with attention in their blocks:",
        _left(attending, "PAL"),
        "## LHUC is rejected by",
        _left(built, "LHUC"),
        "## CA-MTL is rejected by",
        "Types with attention and one stack. In a model with several stacks, such as an encoder and a decoder, "
        "`target_modules` chooses one.",
        _left(single, "CA-MTL"),
        "## All types",
        "\n".join(table),
        "## Types that could not be built",
        "The last reason of each of their classes.",
        missing,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _plain_text(reason: str) -> str:
    """A reason in one line, without the marks of a table or of HTML."""
    return re.sub(r"[|<>`*_\[\]]+", " ", " ".join(reason.split()))[:200].strip()


def write_page() -> None:
    """Write the page."""
    PAGE.write_text(render())
