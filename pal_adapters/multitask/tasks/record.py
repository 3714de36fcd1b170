"""ReCoRD of SuperGLUE: which entity of a passage fills the gap in a query."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import datasets
import numpy as np

from pal_adapters.multitask.metrics.builtin import score_answers
from pal_adapters.multitask.metrics.custom import SplitMetric

from .types import Row, Segments, TaskDataError

_COLUMNS = ("passage", "query", "entities", "answers")


def render(row: Row) -> list[Segments]:
    """The passage against the query with the entity in its gap."""
    return [(row["passage"].replace("@highlight\n", "- "), row["query"].replace("@placeholder", row["entity"]))]


def expand(rows: datasets.Dataset) -> datasets.Dataset:
    """One example for each entity of a query, labelled by whether the entity is an answer."""
    for column in _COLUMNS:
        if column not in rows.column_names:
            raise TaskDataError(f"task 'record': no column {column!r}; found: {', '.join(rows.column_names)}")

    def each(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in ("passage", "query", "entity", "answers", "label")}
        for passage, query, entities, answers in zip(*(batch[column] for column in _COLUMNS), strict=True):
            for entity in dict.fromkeys(entities):
                values = (passage, query, entity, answers, int(entity in answers))
                for name, value in zip(out, values, strict=True):
                    out[name].append(value)
        return out

    return rows.map(each, batched=True, remove_columns=rows.column_names)


def _score(rows: datasets.Dataset, logits: np.ndarray) -> dict[str, float]:
    """Word F1 and exact match of the highest-scoring entity of each query, against the best of its answers."""
    certain = logits[:, 1] - logits[:, 0]
    members = defaultdict(list)
    for number, key in enumerate(zip(rows["passage"][:], rows["query"][:], strict=True)):
        members[key].append(number)
    entities, answers = rows["entity"][:], rows["answers"][:]
    best = [max(numbers, key=lambda n: certain[n]) for numbers in members.values()]
    found = score_answers(("f1", "exact_match"), [entities[n] for n in best], [answers[n] for n in best])
    return {"f1": found["f1"], "exact_match": found["exact_match"]}


record_f1 = SplitMetric("record_f1", ("f1", "exact_match"), _score)
"""The metrics of the benchmark."""

RECORD: dict[str, Any] = {
    "text_columns": ("passage", "query", "entity"),
    "label_names": ("wrong", "right"),
    "metrics": (record_f1,),
    "render": render,
    "expand": expand,
    "split_columns": ("passage",),
}
"""Fields of the task."""
