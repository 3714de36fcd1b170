"""The table of the claims in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tabulate

HEAD = ("claim", "paper", "here: difference in points", "seeds", "spread", "trained per task", "verdict")


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")


def measured(line: dict[str, Any]) -> str:
    found = line["difference"]
    if found is None:
        return "no task learned" if line["not_learned"] else "not run"
    text = signed(found["mean"])
    if found["interval"] is not None:
        low, high = found["interval"]
        text += f" ({signed(low)} to {signed(high)})"
    return text


def row(line: dict[str, Any]) -> list[str]:
    left, right = line["parameters"]
    trained = "" if left is None or right is None else f"{left:,.0f}, {right:,.0f}"
    found = line["difference"] or {"seeds": 0, "spread": None}
    spread = "" if found["spread"] is None else f"{found['spread']:.1f}"
    return [line["says"], line["paper"], measured(line), str(found["seeds"]), spread, trained, line["verdict"]]


def notes(line: dict[str, Any]) -> str:
    """What an undecided line needs, and which tasks are no part of it."""
    found = [line["needs"]] if line["needs"] else []
    if line["difference"] is not None and line["missing"]:
        found.append(f"the difference is without {', '.join(line['missing'])}")
    if line["not_learned"]:
        found.append(f"no recipe learned {', '.join(line['not_learned'])}")
    return f"- {line['says']}: {'; '.join(found)}." if found else ""


def table(lines: Sequence[dict[str, Any]], command: str | None = None) -> str:
    """One line for each part of a claim; below, what the undecided ones need and the command that gives it."""
    text = tabulate.tabulate([row(line) for line in lines], HEAD, tablefmt="pipe", disable_numparse=True)
    below = [note for line in lines if (note := notes(line))]
    if below:
        text += "\n\n" + "\n".join(below)
    if command is not None and any(line["needs"] for line in lines):
        text += f"\n\nThis continues where it stopped:\n\n```bash\n{command}\n```"
    return text + "\n"


def cells(line: dict[str, Any]) -> str:
    """The scores of a line by task: mean over the seeds, and each seed."""
    rows = []
    for one in line["cells"]:
        for side in one["sides"]:
            scores = side["scores"]
            mean = f"{sum(scores) / len(scores):.1f}" if scores else ""
            rows.append(
                [
                    one["name"], side["recipe"], f"{side['trivial']:.1f}" if scores else "", mean,
                    ", ".join(f"{value:.1f}" for value in scores),
                    "" if side["learning_rate"] is None else f"{side['learning_rate']:g}",
                    ", ".join(map(str, side["steps"])),
                ]
            )  # fmt: skip
    head = ("task", "recipe", "no input", "mean", "by seed", "learning rate", "steps")
    return tabulate.tabulate(rows, head, tablefmt="pipe", disable_numparse=True)
