"""What the GLUE and SuperGLUE tasks look like: columns, labels, metrics, and how a row becomes text.

Most tasks are a sentence or a pair of sentences as they stand. The others are turned into pairs:

* copa: the premise and its question ("What was the cause of this?") against each of the two choices. The model gives
  each pair a score with one output, and the softmax over the two scores is trained: choices are compared, and
  exchanging them exchanges the answer.
* multirc: the paragraph against the question with one answer; a row is an answer, right or wrong on its own.
* wsc: the text, its pronoun between asterisks, against the noun phrase that the pronoun may stand for.
* wic: the word with its first sentence against its second sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pal_adapters.errors import PalAdaptersError

Segments = tuple[str, str | None]
"""The text of one encoder input: a sentence, or a pair of them. The second is `None` for a single sentence."""

Row = Mapping[str, Any]


class TaskDataError(PalAdaptersError, ValueError):
    """A task that does not exist, or data that do not fit it. The message is one line and names the place."""


@dataclass(frozen=True)
class TaskSpec:
    """One text-classification or regression task.

    Args:
        name: Short name. It is also the name of the adapter, of the head and of the data folder.
        benchmark: Collection that the task belongs to, which is also the name of the folder above the task's.
        text_columns: Columns that `segments` reads; only these and the label have to be in the data.
        label_column: Column of the label: an integer class number, or a float for a regression.
        num_labels: Number of classes; 1 means regression.
        label_names: Names of the classes by number; empty for a regression.
        metrics: Names of the metrics that `TaskMetric` reports, the one used to choose a model first.
        label_range: Smallest and largest label of a regression.
        num_choices: Encoder inputs for each row. With more than one, every input gets a single score, and the class
            is the number of the input with the highest one.
        group_columns: Columns that say which rows belong to one question (for `exact_match`).
        split_columns: Columns whose equal values must stay on one side when a split is cut in two.
        validation_splits: Names of the validation splits. The first must exist.
        render: Turns a row into `num_choices` encoder inputs. By default the text columns as they are.

    Example:
        >>> get_task("STS-B").text_columns
        ('sentence1', 'sentence2')
    """

    name: str
    benchmark: Literal["glue", "super_glue", "toy"]
    text_columns: tuple[str, ...]
    label_column: str = "label"
    num_labels: int = 2
    label_names: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    label_range: tuple[float, float] | None = None
    num_choices: int = 1
    group_columns: tuple[str, ...] = ()
    split_columns: tuple[str, ...] = ()
    validation_splits: tuple[str, ...] = ("validation",)
    render: Callable[[Row], list[Segments]] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number on a scale rather than a class."""
        return self.num_labels == 1

    @property
    def head_size(self) -> int:
        """Outputs of the task's head for one encoder input."""
        return 1 if self.num_choices > 1 else self.num_labels

    @property
    def full_name(self) -> str:
        """Name with the benchmark in front, such as `glue/rte`."""
        return f"{self.benchmark}/{self.name}"

    def segments(self, row: Row) -> list[Segments]:
        """Encoder inputs of a row: `num_choices` of them, each a sentence or a pair of sentences."""
        if self.render is not None:
            return self.render(row)
        first, *rest = (row[column] for column in self.text_columns)
        return [(first, rest[0] if rest else None)]

    def allowed_labels(self) -> str:
        """The labels in words, for error messages."""
        if self.is_regression:
            low, high = self.label_range or (float("-inf"), float("inf"))
            return f"a number from {low} to {high}"
        return ", ".join(f"{number} ({name})" for number, name in enumerate(self.label_names))


_COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def _copa(row: Row) -> list[Segments]:
    """Two inputs: the premise with its question spelled out, against each of the two choices."""
    question = _COPA_QUESTIONS.get(row["question"])
    if question is None:
        raise TaskDataError(f"column 'question' holds {row['question']!r}; allowed: cause, effect")
    premise = f"{row['premise']} {question}"
    return [(premise, row["choice1"]), (premise, row["choice2"])]


def _multirc(row: Row) -> list[Segments]:
    """The paragraph against the question followed by one answer."""
    return [(row["paragraph"], f"{row['question']} {row['answer']}".strip())]


def _wic(row: Row) -> list[Segments]:
    """The word and its first sentence against its second sentence."""
    return [(f"{row['word']}: {row['sentence1']}", row["sentence2"])]


def _wsc(row: Row) -> list[Segments]:
    """The text with the pronoun in asterisks, against the noun phrase it may stand for.

    The second span is found by its word number, because the same pronoun often stands more than once in the text.
    """
    words = row["text"].split()
    start, length = row["span2_index"], max(1, len(row["span2_text"].split()))
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= len(words) - length:
        raise TaskDataError(f"column 'span2_index' holds {start!r}; allowed: 0 to {len(words) - length}")
    marked = [*words[:start], "*", *words[start : start + length], "*", *words[start + length :]]
    return [(" ".join(marked), row["span1_text"])]


_NLI = ("entailment", "not_entailment")
_YES_NO = ("false", "true")

_SPECS = (
    TaskSpec("cola", "glue", ("sentence",), label_names=("unacceptable", "acceptable"), metrics=("matthews",)),
    TaskSpec("sst2", "glue", ("sentence",), label_names=("negative", "positive")),
    TaskSpec(
        "mrpc",
        "glue",
        ("sentence1", "sentence2"),
        label_names=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
    ),
    TaskSpec(
        "qqp",
        "glue",
        ("question1", "question2"),
        label_names=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
    ),
    TaskSpec(
        "stsb",
        "glue",
        ("sentence1", "sentence2"),
        num_labels=1,
        metrics=("pearson", "spearman"),
        label_range=(0.0, 5.0),
    ),
    TaskSpec(
        "mnli",
        "glue",
        ("premise", "hypothesis"),
        num_labels=3,
        label_names=("entailment", "neutral", "contradiction"),
        validation_splits=("validation_matched", "validation_mismatched"),
    ),
    TaskSpec("qnli", "glue", ("question", "sentence"), label_names=_NLI),
    TaskSpec("rte", "glue", ("sentence1", "sentence2"), label_names=_NLI),
    TaskSpec("wnli", "glue", ("sentence1", "sentence2"), label_names=("not_entailment", "entailment")),
    TaskSpec("boolq", "super_glue", ("question", "passage"), label_names=_YES_NO, split_columns=("passage",)),
    TaskSpec(
        "cb",
        "super_glue",
        ("premise", "hypothesis"),
        num_labels=3,
        label_names=("entailment", "contradiction", "neutral"),
        metrics=("accuracy", "f1_macro"),
    ),
    TaskSpec(
        "copa",
        "super_glue",
        ("premise", "choice1", "choice2", "question"),
        label_names=("choice1", "choice2"),
        num_choices=2,
        render=_copa,
    ),
    TaskSpec(
        "multirc",
        "super_glue",
        ("paragraph", "question", "answer"),
        label_names=_YES_NO,
        metrics=("f1", "exact_match", "accuracy"),
        group_columns=("paragraph", "question"),
        split_columns=("paragraph",),
        render=_multirc,
    ),
    TaskSpec("rte", "super_glue", ("premise", "hypothesis"), label_names=_NLI),
    TaskSpec("wic", "super_glue", ("word", "sentence1", "sentence2"), label_names=_YES_NO, render=_wic),
    TaskSpec(
        "wsc", "super_glue", ("text", "span1_text", "span2_text", "span2_index"), label_names=_YES_NO, render=_wsc
    ),
)

TASKS: dict[str, TaskSpec] = {spec.full_name: spec for spec in _SPECS}
"""Every task by its full name (`glue/rte`)."""

_ALIASES = {"sst": "sst2", "sts": "stsb", "stsbenchmark": "stsb", "mnlimatched": "mnli", "commitmentbank": "cb"}
_PREFIXES = {"superglue": "super_glue", "glue": "glue"}


def task_names() -> tuple[str, ...]:
    """Short names of all tasks, sorted. `rte` is in both benchmarks and stands here once."""
    return tuple(sorted({spec.name for spec in _SPECS}))


def find_tasks(name: str) -> list[TaskSpec]:
    """All tasks that a name may mean: more than one only for a short name that both benchmarks have.

    Case, hyphens and underscores do not count: `STS-B`, `sts_b` and `stsb` are one task. A benchmark may stand in
    front: `super_glue/rte`.

    Raises:
        TaskDataError: If no task has that name.
    """
    *prefix, short = re.split(r"[/:]", name.strip().lower())
    short = re.sub(r"[^a-z0-9]", "", short)
    short = _ALIASES.get(short, short)
    benchmark = _PREFIXES.get(re.sub(r"[^a-z]", "", prefix[0])) if len(prefix) == 1 else None
    if benchmark is not None or not prefix:
        found = [spec for spec in _SPECS if spec.name == short and benchmark in (None, spec.benchmark)]
        if found:
            return found
    raise TaskDataError(
        f"unknown task {name!r}; allowed: {', '.join(task_names())} "
        "(with 'glue/' or 'super_glue/' in front where the benchmark matters)"
    )


def get_task(name: str) -> TaskSpec:
    """The task of that name; `rte` alone means the one of GLUE.

    Raises:
        TaskDataError: If no task has that name.
    """
    return find_tasks(name)[0]
