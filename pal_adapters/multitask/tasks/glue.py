"""The GLUE and SuperGLUE tasks as fields of `Task`: columns, labels, metrics, and how an example becomes text.

Most tasks are a sentence or a pair of sentences and are encoded as they are. The others are turned into pairs:

* copa: the premise and its question ("What was the cause of this?") against each of the two choices. The model gives
  each pair one score and is trained on the softmax over the two scores: choices are compared with each other, so
  swapping them swaps the answer.
* multirc: the paragraph against the question followed by one answer; each answer is an example of its own.
* wsc: the text, with its pronoun between asterisks, against the noun phrase that the pronoun may stand for.
* wic: the word and its first sentence against its second sentence.
* record: the passage against the query with one entity in its gap; each entity is an example of its own, and the one
  with the highest score answers the query.
"""

from __future__ import annotations

import re
from typing import Any

from .record import RECORD
from .types import Row, Segments, TaskDataError

_COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def _copa(row: Row) -> list[Segments]:
    question = _COPA_QUESTIONS.get(row["question"])
    if question is None:
        raise TaskDataError(f"column 'question' holds {row['question']!r}; allowed: cause, effect")
    premise = f"{row['premise']} {question}"
    return [(premise, row["choice1"]), (premise, row["choice2"])]


def _multirc(row: Row) -> list[Segments]:
    return [(row["paragraph"], f"{row['question']} {row['answer']}".strip())]


def _wic(row: Row) -> list[Segments]:
    return [(f"{row['word']}: {row['sentence1']}", row["sentence2"])]


def _wsc(row: Row) -> list[Segments]:
    # The pronoun is found by its word number, because the same pronoun often occurs more than once in the text.
    words = row["text"].split()
    start, length = row["span2_index"], max(1, len(row["span2_text"].split()))
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= len(words) - length:
        raise TaskDataError(f"column 'span2_index' holds {start!r}; allowed: 0 to {len(words) - length}")
    marked = [*words[:start], "*", *words[start : start + length], "*", *words[start + length :]]
    return [(" ".join(marked), row["span1_text"])]


def _classes(*label_names: str, **fields: Any) -> dict[str, Any]:
    return {"label_names": label_names, **fields}


_SENTENCES = {"text_columns": ("sentence1", "sentence2")}
_QUESTIONS = {"text_columns": ("question1", "question2")}
_PREMISE = {"text_columns": ("premise", "hypothesis")}
_NLI = ("entailment", "not_entailment")
_YES_NO = ("false", "true")

TASKS: dict[str, dict[str, Any]] = {
    "glue/cola": _classes("unacceptable", "acceptable", text_columns=("sentence",), metrics=("matthews",)),
    "glue/sst2": _classes("negative", "positive", text_columns=("sentence",)),
    "glue/mrpc": _classes("not_equivalent", "equivalent", metrics=("accuracy", "f1"), **_SENTENCES),
    "glue/qqp": _classes("not_duplicate", "duplicate", metrics=("accuracy", "f1"), **_QUESTIONS),
    "glue/stsb": {
        **_SENTENCES,
        "kind": "regression",
        "metrics": ("pearson", "spearman"),
        "label_range": (0.0, 5.0),
    },
    "glue/mnli": _classes(
        "entailment",
        "neutral",
        "contradiction",
        validation_splits=("validation_matched", "validation_mismatched"),
        **_PREMISE,
    ),
    "glue/qnli": _classes(*_NLI, text_columns=("question", "sentence")),
    "glue/rte": _classes(*_NLI, **_SENTENCES),
    "glue/wnli": _classes("not_entailment", "entailment", **_SENTENCES),
    "super_glue/boolq": _classes(*_YES_NO, text_columns=("question", "passage"), split_columns=("passage",)),
    "super_glue/cb": _classes("entailment", "contradiction", "neutral", metrics=("accuracy", "f1_macro"), **_PREMISE),
    "super_glue/copa": {
        "kind": "multiple_choice",
        "text_columns": ("premise", "choice1", "choice2", "question"),
        "num_choices": 2,
        "metrics": ("accuracy",),
        "render": _copa,
    },
    "super_glue/multirc": _classes(
        *_YES_NO,
        text_columns=("paragraph", "question", "answer"),
        metrics=("f1", "exact_match", "accuracy"),
        group_columns=("paragraph", "question"),
        split_columns=("paragraph",),
        render=_multirc,
    ),
    "super_glue/record": RECORD,
    "super_glue/rte": _classes(*_NLI, **_PREMISE),
    "super_glue/wic": _classes(*_YES_NO, text_columns=("word", "sentence1", "sentence2"), render=_wic),
    "super_glue/wsc": _classes(
        *_YES_NO, text_columns=("text", "span1_text", "span2_text", "span2_index"), render=_wsc
    ),
}
"""The fields of every task, by its full name (`glue/rte`)."""

_ALIASES = {"sst": "sst2", "sts": "stsb", "stsbenchmark": "stsb", "mnlimatched": "mnli", "commitmentbank": "cb"}
_PREFIXES = {"superglue": "super_glue", "glue": "glue"}


def task_names() -> tuple[str, ...]:
    """Short names of all tasks, sorted. `rte`, which is in both benchmarks, is listed once."""
    return tuple(sorted({full.split("/")[1] for full in TASKS}))


def find_tasks(name: str) -> list[str]:
    """Full names of the tasks that a name may refer to: two only for a short name that both benchmarks have.

    Case, hyphens and underscores are ignored: `STS-B`, `sts_b` and `stsb` are the same task. A benchmark may come
    first: `super_glue/rte`.

    Raises:
        TaskDataError: If there is no task of that name.
    """
    *prefix, short = re.split(r"[/:]", name.strip().lower())
    short = re.sub(r"[^a-z0-9]", "", short)
    short = _ALIASES.get(short, short)
    benchmark = _PREFIXES.get(re.sub(r"[^a-z]", "", prefix[0])) if len(prefix) == 1 else None
    if benchmark is not None or not prefix:
        benchmarks = [benchmark] if benchmark else ["glue", "super_glue"]
        found = [f"{one}/{short}" for one in benchmarks if f"{one}/{short}" in TASKS]
        if found:
            return found
    raise TaskDataError(
        f"unknown task {name!r}; allowed: {', '.join(task_names())} "
        "(with 'glue/' or 'super_glue/' in front where the benchmark matters)"
    )
