"""ReCoRD of SuperGLUE: which entity of a passage belongs in the gap of a query."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pal_adapters.multitask.metrics import scores

from .glue import Row, Segments, TaskDataError
from .reading import load_rows
from .task import Task

_COLUMNS = ("passage", "query", "entities", "answers")


def record_task(data_dir: str | Path | None = None, **changes: Any) -> Task:
    """ReCoRD with its data.

    A row makes one encoder input for each entity: the passage, against the query with the entity in its gap, right or
    wrong on its own. At evaluation the entity with the highest score is the answer of its query.
    """
    splits = load_rows("super_glue", "record", data_dir, ("train", "validation"))
    given: dict[str, Any] = {
        "text_columns": ("passage", "query", "entity"),
        "label_names": ("wrong", "right"),
        "metrics": (record_f1,),
        "render": _render,
        "expand": _expand,
        "split_columns": ("passage",),
        "benchmark": "super_glue",
    }
    return Task("record", splits, **{**given, **changes})


def _render(row: Row) -> list[Segments]:
    return [(row["passage"].replace("@highlight\n", "- "), row["query"].replace("@placeholder", row["entity"]))]


def _expand(rows: datasets.Dataset) -> datasets.Dataset:
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


def record_f1(encoded: Any, logits: np.ndarray) -> dict[str, float]:
    """F1 of words and exact match of the best entity of each query, the best over its right answers."""
    certain = logits[:, 1] - logits[:, 0]
    members = defaultdict(list)
    for number, key in enumerate(zip(encoded.rows["passage"][:], encoded.rows["query"][:], strict=True)):
        members[key].append(number)
    entities, answers = encoded.rows["entity"][:], encoded.rows["answers"][:]
    best = [max(numbers, key=lambda n: certain[n]) for numbers in members.values()]
    found = scores.score_answers(("f1", "exact_match"), [entities[n] for n in best], [answers[n] for n in best])
    return {"f1": found["f1"], "exact_match": found["exact_match"]}


record_f1.takes_rows = True  # type: ignore[attr-defined]
