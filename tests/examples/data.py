"""Generated sentences in files with the names and columns of GLUE and SuperGLUE tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pal_adapters.multitask import load_toy_task


def write_tasks(root: Path, *, train_size: int, test_size: int) -> None:
    for task, toy, columns in (
        ("rte", "entailment", {"premise": "sentence1", "hypothesis": "sentence2"}),
        ("cola", "acceptability", {}),
        ("stsb", "similarity", {}),
    ):
        _, splits = load_toy_task(toy, train_size=train_size, test_size=test_size)
        found = {split: rows.rename_columns(columns).to_list() for split, rows in splits.items()}
        write(root / "glue" / task, found)
    copa = [
        {"premise": f"it was {i}.", "choice1": "a.", "choice2": "b c.", "question": "cause", "label": i % 2}
        for i in range(20)
    ]
    write(root / "super_glue" / "copa", {"train": copa, "validation": copa[:9]})


def write(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
