"""Four small tasks made from English templates, for examples and tests that need no data and no network.

Training and test sentences share no content words, so a model has to learn the construction and cannot memorise the
words. In every task the label depends on how words are combined rather than on which words occur: what a negation
applies to, what a verb agrees with, what a quantifier allows, who did what to whom. A linear head on a frozen sentence
encoder therefore scores well below the maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from pal_adapters.checks import require_int

from .task import Task
from .types import TaskDataError

TOY_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "acceptability",
            {},
            text_columns=("sentence",),
            label_names=("unacceptable", "acceptable"),
            metrics=("matthews",),
            benchmark="toy",
        ),
        Task(
            "entailment",
            {},
            text_columns=("premise", "hypothesis"),
            label_names=("entailment", "not_entailment"),
            benchmark="toy",
        ),
        Task("sentiment", {}, text_columns=("sentence",), label_names=("negative", "positive"), benchmark="toy"),
        Task(
            "similarity",
            {},
            kind="regression",
            text_columns=("sentence1", "sentence2"),
            metrics=("pearson", "spearman"),
            label_range=(0.0, 5.0),
            benchmark="toy",
        ),
    )
}
"""The toy tasks by name, without data."""


@dataclass(frozen=True)
class Lexicon:
    """The content words of one split. All nouns form their plural with -s and all verbs their past tense with -ed."""

    people: tuple[str, ...]
    things: tuple[str, ...]
    verbs: tuple[str, ...]
    actions: tuple[str, ...]
    sizes: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]


WORDS = {
    "train": Lexicon(
        people=(
            "nurse", "pilot", "farmer", "lawyer", "singer", "baker", "guard", "painter", "teacher", "sailor",
            "student", "doctor", "hunter", "poet", "miner", "waiter",
        ),
        things=(
            "soup", "hotel", "film", "concert", "novel", "lecture", "camera", "garden", "breakfast", "tour", "phone",
            "song", "train ride", "wine", "bakery", "speech",
        ),
        verbs=("thank", "follow", "call", "help", "push", "visit", "greet", "film", "warn", "trick"),
        actions=("wait", "rest", "shout", "work", "jump", "laugh", "pray", "talk"),
        sizes=("tall", "young", "tired", "happy", "angry", "quiet", "rich", "clever"),
        good=(
            "delightful", "excellent", "charming", "superb", "lovely", "brilliant", "enjoyable", "wonderful",
            "pleasant", "great", "amazing", "beautiful",
        ),
        bad=(
            "awful", "boring", "terrible", "dreadful", "disgusting", "poor", "horrible", "unpleasant", "bad", "dull",
            "annoying", "ugly",
        ),
        places=(
            "at the station", "in the park", "near the river", "at the market", "in the library", "at the harbour",
        ),
        times=("on Monday", "in the morning", "last winter", "at noon", "on Sunday", "last week"),
    ),
    "test": Lexicon(
        people=("clerk", "dancer", "driver", "actor", "judge", "gardener", "plumber", "writer", "soldier", "tailor"),
        things=("play", "museum", "dinner", "podcast", "bicycle", "cake", "poem", "flight", "painting", "restaurant"),
        verbs=("watch", "thrill", "attack", "touch", "annoy", "wound"),
        actions=("listen", "cough", "whisper", "yawn", "knock", "sneer"),
        sizes=("short", "old", "calm", "proud", "lonely", "polite"),
        good=("fantastic", "marvellous", "fine", "fascinating", "impressive", "splendid", "good", "perfect"),
        bad=("atrocious", "tedious", "nasty", "disappointing", "lousy", "mediocre", "miserable", "dismal"),
        places=("in the kitchen", "at the airport", "near the church", "on the bridge"),
        times=("on Friday", "in the evening", "last summer", "at midnight"),
    ),
}  # fmt: skip
"""Content words of the two splits; no word is in both."""


def load_toy_task(
    name: str, *, train_size: int = 800, test_size: int = 400, seed: int = 0
) -> tuple[Task, datasets.DatasetDict]:
    """One of `TOY_TASKS`, without data, and its splits "train" and "validation": the arguments of `Task.from_spec`.

    The same arguments give the same examples. No example occurs twice, within a split or across both.

    Raises:
        TaskDataError: If there is no such task, or the templates cannot produce that many examples.

    Examples:
        >>> task, data = load_toy_task("similarity", train_size=8, test_size=4)
        >>> len(data["train"]), task.num_labels
        (8, 1)
    """
    require_int("train_size", train_size, minimum=1)
    require_int("test_size", test_size, minimum=1)
    require_int("seed", seed, minimum=0)
    if not isinstance(name, str) or name not in TOY_TASKS:
        raise TaskDataError(f"unknown toy task {name!r}; allowed: {', '.join(sorted(TOY_TASKS))}")
    task = TOY_TASKS[name]
    # A generator for each task and split, so that the size of one does not change the examples of another.
    rng = {split: np.random.default_rng([seed, sorted(TOY_TASKS).index(name), i]) for i, split in enumerate(WORDS)}
    return task, datasets.DatasetDict(
        train=_make(task, WORDS["train"], train_size, rng["train"]),
        validation=_make(task, WORDS["test"], test_size, rng["test"]),
    )


def _make(task: Task, words: Lexicon, size: int, rng: np.random.Generator) -> datasets.Dataset:
    write = _WRITERS[task.name]
    rows: dict[tuple[str, ...], float | int] = {}
    in_vain = 0
    while len(rows) < size:
        if in_vain == 2000:
            raise TaskDataError(f"toy task {task.name!r}: the templates cannot produce {size} different examples")
        # Labels alternate, so the classes are equally frequent.
        texts, label = write(words, rng, len(rows))
        row = tuple(text[0].upper() + text[1:] for text in texts)
        in_vain = in_vain + 1 if row in rows else 0
        rows.setdefault(row, label)
    order = rng.permutation(size)
    items = list(rows.items())
    columns: dict[str, list[Any]] = {
        column: [items[i][0][position] for i in order] for position, column in enumerate(task.text_columns)
    }
    columns["label"] = [items[i][1] for i in order]
    value = datasets.Value("float64" if task.kind == "regression" else "int64")
    features = datasets.Features({column: datasets.Value("string") for column in task.text_columns} | {"label": value})
    return datasets.Dataset.from_dict(columns, features=features)


def _pick(rng: np.random.Generator, options: tuple[Any, ...], count: int = 1) -> Any:
    chosen = [options[i] for i in rng.choice(len(options), size=count, replace=False)]
    return chosen[0] if count == 1 else chosen


_PLAIN = (
    "the {n} was {a}.",
    "I found the {n} {a}.",
    "everyone said that the {n} was {a}.",
    "the {n} was really {a}.",
)
_NEGATED = (
    "the {n} was not {a}.",
    "I did not find the {n} {a}.",
    "nobody said that the {n} was {a}.",
    "the {n} was far from {a}.",
    "the {n} was anything but {a}.",
)
_NEGATED_ELSEWHERE = (
    "it was not cheap, but the {n} was {a}.",
    "nobody expected it, but I found the {n} {a}.",
    "I did not stay long, and the {n} was {a}.",
    "far from home, I found the {n} {a}.",
)


def _sentiment(words: Lexicon, rng: np.random.Generator, number: int) -> tuple[list[str], int]:
    """Polarity of an adjective, reversed by a negation that applies to it but not by one elsewhere."""
    label = number % 2
    frames = (_PLAIN, _NEGATED, _NEGATED, _NEGATED_ELSEWHERE)[rng.integers(4)]
    positive = bool(label) is not (frames is _NEGATED)
    adjective = _pick(rng, words.good if positive else words.bad)
    return [_pick(rng, frames).format(n=_pick(rng, words.things), a=adjective)], label


def _acceptability(words: Lexicon, rng: np.random.Generator, number: int) -> tuple[list[str], int]:
    """Whether the form of the verb fits the words before it; each form is right in some contexts only."""
    label = number % 2
    noun, verb, place = _pick(rng, words.people), _pick(rng, words.actions), _pick(rng, words.places)
    plural = bool(rng.integers(2))
    behind = {
        "did not": "",
        "will": "",
        "wanted to": "",
        "have" if plural else "has": "ed",
        "had": "ed",
        "are" if plural else "is": "ing",
        "were" if plural else "was": "ing",
    }
    helper = _pick(rng, tuple(behind))
    endings = {"", "ed", "ing"} - {behind[helper]}
    ending = behind[helper] if label else _pick(rng, tuple(sorted(endings)))
    return [f"the {noun}{'s' * plural} {helper} {verb}{ending} {place}."], label


_FOLLOWS = {
    "all": {"all", "most", "some"},
    "most": {"most", "some"},
    "some": {"some"},
    "no": {"no", "not all"},
    "not all": {"not all"},
}


def _entailment(words: Lexicon, rng: np.random.Generator, number: int) -> tuple[list[str], int]:
    """Quantifiers, negation, and details that are omitted or swapped. Class 0 is entailment."""
    label = number % 2
    while True:
        premise, hypothesis, follows = _inference(words, rng)
        if follows is (label == 0):
            return [premise, hypothesis], label


def _inference(words: Lexicon, rng: np.random.Generator) -> tuple[str, str, bool]:
    subject, other, stranger = _pick(rng, words.people, 3)
    verb, deed = _pick(rng, words.verbs, 2)
    kind, kept = rng.integers(4), bool(rng.integers(2))
    if kind == 0:  # the place may be omitted; another agent or another verb does not follow
        said = f"the {subject} {verb}ed the {other}"
        changed = (f"the {stranger} {verb}ed the {other}", f"the {subject} {deed}ed the {other}")[rng.integers(2)]
        return f"{said} {_pick(rng, words.places)}.", f"{said if kept else changed}.", kept
    if kind == 1:
        forms = (f"the {subject} {verb}ed the {other}.", f"the {subject} did not {verb} the {other}.")
        denied = int(rng.integers(2))
        return forms[denied], forms[denied if kept else 1 - denied], kept
    one, two = (tuple(_FOLLOWS)[i] for i in rng.integers(len(_FOLLOWS), size=2))
    event = f"{subject}s {verb}ed the {other}."
    return f"{one} {event}", f"{two} {event}", two in _FOLLOWS[one]


def _similarity(words: Lexicon, rng: np.random.Generator, number: int) -> tuple[list[str], float]:
    """How many of five roles two events share: agent, verb, patient, place and time."""
    fillers = (words.people, words.verbs, words.people, words.places, words.times)
    agent, patient = _pick(rng, words.people, 2)
    first = [agent, _pick(rng, words.verbs), patient, _pick(rng, words.places), _pick(rng, words.times)]
    second = list(first)
    if number % 6 == 3 and rng.integers(2):  # the same words with agent and patient swapped
        second[0], second[2] = patient, agent
    else:
        for role in rng.choice(5, size=5 - number % 6, replace=False):
            taken = {first[0], first[2], second[0], second[2]} if role in (0, 2) else {first[role]}
            second[role] = _pick(rng, tuple(word for word in fillers[role] if word not in taken))
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return [_tell(first, rng), _tell(second, rng)], float(same)


def _tell(event: list[str], rng: np.random.Generator) -> str:
    agent, verb, patient, place, time = event
    active, passive = f"the {agent} {verb}ed the {patient}", f"the {patient} was {verb}ed by the {agent}"
    told = (active, passive)[rng.integers(2)]
    return f"{told} {place} {time}." if rng.integers(2) else f"{time}, {told} {place}."


_WRITERS: dict[str, Callable[[Lexicon, np.random.Generator, int], tuple[list[str], float | int]]] = {
    "acceptability": _acceptability,
    "entailment": _entailment,
    "sentiment": _sentiment,
    "similarity": _similarity,
}
