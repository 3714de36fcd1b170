"""What folding and reporting return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pal_adapters.errors import ConfigError


@dataclass(frozen=True)
class Folded:
    """The result of `fold` in `adapters`.

    Attributes:
        name: name of the new adapter.
        widths: its width at each place, such as `{"0.output_adapter": 384}`.
        errors: the error of the adapter's output at each truncated place, relative to that output (root mean squares
            over tokens and channels). Empty for an exact fold.
    """

    name: str
    widths: Mapping[str, int]
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest of `errors`; 0 for an exact fold."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True)
class TransferTable:
    """How much each source counts at each place.

    Attributes:
        sources: names of the columns.
        places: names of the rows, from the first block to the last; `"all"` if blocks share their coefficients.
        values: one row per place with one number per source; None where a source does not act.
        measure: what the numbers are, such as `"mean |coefficient|"`.
        start: what each number is before training; None if nothing is trained.
    """

    sources: Sequence[str]
    places: Sequence[str]
    values: Sequence[Sequence[float | None]]
    measure: str = "mean |coefficient|"
    start: float | None = None

    def __post_init__(self) -> None:
        if len(self.values) != len(self.places) or any(len(row) != len(self.sources) for row in self.values):
            raise ConfigError(
                f"values with rows of {[len(row) for row in self.values]} numbers are not allowed: pass "
                f"{len(self.places)} rows of {len(self.sources)} numbers."
            )

    def totals(self) -> dict[str, float | None]:
        """The mean of each source over the places where it acts; None for a source that acts nowhere."""
        columns = [[v for row in self.values if (v := row[i]) is not None] for i in range(len(self.sources))]
        return {s: sum(c) / len(c) if c else None for s, c in zip(self.sources, columns, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists that can be written as JSON."""
        return {
            "measure": self.measure,
            "start": self.start,
            "sources": list(self.sources),
            "places": list(self.places),
            "values": [list(row) for row in self.values],
        }

    def __str__(self) -> str:
        left = max(len(place) for place in ("mean", *self.places))
        widths = [max(len(source), 6) for source in self.sources]
        rows = [*zip(self.places, self.values, strict=True), ("mean", list(self.totals().values()))]
        lines = [" ".join([" " * left, *(s.rjust(w) for s, w in zip(self.sources, widths, strict=True))])]
        for place, values in rows:
            numbers = (("" if v is None else f"{v:.3f}").rjust(w) for v, w in zip(values, widths, strict=True))
            lines.append(" ".join([place.rjust(left), *numbers]))
        return "\n".join([self.measure, *lines])
