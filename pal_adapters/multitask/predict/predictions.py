"""The results of a `Predictor`, one class for each kind of task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of one request.

    Args:
        task: Name of the task.
        array: The numbers that the result was read from, if they were asked for with `arrays=True`.
    """

    task: str
    array: np.ndarray | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON, without the array."""
        return {name: value for name, value in asdict(self).items() if name != "array"}


@dataclass(frozen=True, kw_only=True)
class LabelPrediction(Prediction):
    """One label, for `single_label`. The array has the probabilities of all labels `[c]`.

    Args:
        label: The most probable label.
        score: Its probability.
        scores: The probability of each label; they sum to 1.
    """

    label: str
    score: float
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class LabelsPrediction(Prediction):
    """Several labels or none, for `multi_label`. The array has the probabilities of all labels `[c]`.

    Args:
        labels: The labels whose probability reaches their threshold, the most probable first.
        scores: The probability of each label; they do not sum to 1.
    """

    labels: tuple[str, ...]
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class NumberPrediction(Prediction):
    """A number, for `regression`. The array has all numbers `[c]`.

    Args:
        value: The number, or the first of several.
        values: Every number by its name.
    """

    value: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Entity:
    """A labeled part of a text.

    Args:
        label: Its label, such as `PER`, without `B-` or `I-`.
        text: The part itself.
        start: Its first character in the text.
        end: The character after its last one.
        score: Mean probability of the labels of its words.
    """

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, kw_only=True)
class EntitiesPrediction(Prediction):
    """Labels of words, for `token_tagging`. The array has the probabilities of all labels for each word `[words, c]`.

    Args:
        text: The text that offsets refer to: the one given, or the given words joined by spaces.
        words: Its words.
        labels: The label of each word, such as `B-PER`; `O` for a word that the tokenizer drops.
        entities: With labels of the form `B-PER`, `I-PER`, the entities; otherwise each word whose label is not `O`.
    """

    text: str
    words: tuple[str, ...]
    labels: tuple[str, ...]
    entities: tuple[Entity, ...]


@dataclass(frozen=True, kw_only=True)
class AnswerPrediction(Prediction):
    """The answer to a question in its context, or none, for `span_qa`. The array has the logits of the answer's first
    and last token over the tokens of its window `[n, 2]`; without an answer, over those of the first window.

    Args:
        answer: The answer; `None` if the context has none.
        start: Its first character in the context.
        end: The character after its last one.
        score: Product of the probabilities of its first and last token, or of "no answer", in the window.
    """

    answer: str | None
    start: int | None
    end: int | None
    score: float


@dataclass(frozen=True, kw_only=True)
class ChoicePrediction(Prediction):
    """One of the choices, for `multiple_choice`. The array has the probabilities of all choices `[choices]`.

    Args:
        choice: Name of the choice, by default that of its column.
        text: The text of the choice, if it is in a column of that name.
        score: Its probability.
        scores: The probability of each choice; they sum to 1.
    """

    choice: str
    text: str | None
    score: float
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TextPrediction(Prediction):
    """The continuation of a text, for `language_modeling`: the one generated, or the score of the one given. The array
    has the log-probability of each of its tokens `[n]`.

    Args:
        text: The continuation.
        generated: Whether it was generated.
        log_probability: Sum of the natural logarithms of the probabilities of its tokens.
        tokens: Number of its tokens.
        greedy: Whether each of its tokens is the most probable one.
    """

    text: str
    generated: bool
    log_probability: float
    tokens: int
    greedy: bool
