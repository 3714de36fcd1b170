"""The table of bounds and verdicts, as text, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .measure import Bound, Measured

START, END = "<!-- bounds: written by benchmarks/bench.py -->", "<!-- end of bounds -->"
SECTIONS = {1: "Mixed batches", 2: "Small batches and decoding", 3: "Large bases and many adapters"}
Row = dict[str, Any]


def row_of(bound: Bound, measured: Measured | str, mode: str) -> Row:
    """One line of the table; a string says why there is no value."""
    row: Row = {
        "section": bound.section, "what": bound.what, "of": bound.of, "mode": mode, "limit": bound.limit,
        "floor": bound.floor, "unit": bound.unit,
    }  # fmt: skip
    if isinstance(measured, str):
        return {**row, "value": None, "verdict": f"not measured: {measured}"}
    quartiles = {} if measured.q1 is None else {"q1": measured.q1, "q3": measured.q3}
    found = {name: round(value, 4) for name, value in {"value": measured.value, **quartiles}.items()}
    return {**row, **found, "rounds": measured.rounds, "note": measured.note, "verdict": bound.verdict(measured)}


def _value(row: Row) -> str:
    if row["value"] is None:
        return "–"
    if row["unit"] != "x":
        return f"{row['value']:,.0f} {row['unit']}"
    spread = f" ({row['q1']:.3f} to {row['q3']:.3f})" if "q1" in row else ""
    return f"{row['value']:.3f}{spread}"


def _cells(row: Row) -> list[str]:
    of = row["of"] if row["mode"] == "eager" else f"{row['of']}, {row['mode']}"
    limit = "–" if row["limit"] is None else f"{row['limit']:.2f}"
    floor = "–" if row["floor"] is None else f"{row['floor']:.2f}"
    verdict = row["verdict"] or "–"
    note = f" ({row['note']})" if row.get("note") else ""
    return [of, limit, floor, _value(row), verdict + note]


def text(rows: Iterable[Row]) -> str:
    """For the terminal."""
    lines: list[str] = []
    heading = None
    for row in rows:
        if row["what"] != heading:
            heading = row["what"]
            lines.append(f"\n{SECTIONS[row['section']]}: {heading}")
        of, limit, _, value, verdict = _cells(row)
        lines.append(f"  {of:44} at most {limit:5} measured {value:28} {verdict}")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """For the documentation."""
    lines = [", ".join(f"{name} {value}" for name, value in {**result["versions"], **result["machine"]}.items()) + "."]
    heading = section = None
    for row in result["bounds"]:
        if row["section"] != section:
            section = row["section"]
            lines += ["", f"### {SECTIONS[section]}"]
        if row["what"] != heading:
            heading = row["what"]
            lines += ["", heading[0].upper() + heading[1:] + ".", ""]
            lines += ["| | bound | arithmetic limit | measured | verdict |", "|---|---:|---:|---|---|"]
        lines.append(f"| {' | '.join(_cells(row))} |")
    return "\n".join(lines)


def earlier_rows(path: Path, about: dict[str, Any], bounds: Iterable[Bound]) -> list[Row]:
    """The rows of an earlier result that are still bounds.

    Args:
        path: File of the result.
        about: Versions and machine of the run that goes on with it.
        bounds: All bounds.

    Raises:
        SystemExit: if the versions or the machine are others.
    """
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part, value in about.items():
        if earlier[part] != value:
            raise SystemExit(f"{path} has {part} {earlier[part]}, not {value}: measure all bounds again.")
    known = {(bound.what, bound.of) for bound in bounds}
    return [row for row in earlier["bounds"] if (row["what"], row["of"]) in known]


def merged(earlier: Iterable[Row], again: Iterable[Row], bounds: Iterable[Bound]) -> list[Row]:
    """Earlier rows with those that were measured again in their places, in the order of the bounds."""
    place = {(bound.what, bound.of): number for number, bound in enumerate(bounds)}
    rows = {(row["what"], row["of"], row["mode"]): row for row in (*earlier, *again)}
    return sorted(rows.values(), key=lambda row: (place[row["what"], row["of"]], row["mode"] != "eager"))


def write_docs(path: Path, result: dict[str, Any]) -> None:
    """Replace the tables between the two marks of a page."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{path} lacks the marks {START!r} and {END!r}.")
    path.write_text(f"{before}{START}\n{markdown(result)}\n{END}{after}", encoding="utf-8")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """All rows, with versions and machine."""
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
