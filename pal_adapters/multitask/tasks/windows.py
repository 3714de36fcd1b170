"""Questions over long contexts: the context is cut into overlapping windows, each of which is encoded on its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .types import TaskDataError

_LONGEST_ANSWER = 30
_OVERLAP = 128

Window = tuple[int, np.ndarray]
"""The index of a window's example, and the characters of each token in the context `[n, 2]`, -1 outside it."""


@dataclass(frozen=True)
class Span:
    """An answer: its position in the context, and its scores.

    Args:
        start: Its first character.
        end: The character after its last one.
        total: Sum of the logits of its first and last token.
        probability: Product of their probabilities in their window.
        window: Index of that window.
    """

    start: int
    end: int
    total: float
    probability: float
    window: int


def window_overlap(max_length: int) -> int:
    """Tokens that consecutive windows share."""
    return min(_OVERLAP, max_length // 4)


def encode_questions(
    tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], max_length: int, where: str, first: int
) -> tuple[Any, list[Window]]:
    """The encoded windows of some questions, and the part of the context that each shows.

    Args:
        tokenizer: A fast tokenizer.
        questions: The questions.
        contexts: Their contexts.
        max_length: Maximum number of tokens of a window.
        where: What error messages call the examples.
        first: Index of the first of them among all examples.

    Raises:
        TaskDataError: For a question that leaves too little room for its context.
    """
    questions = [question.lstrip() for question in questions]
    overlap = window_overlap(max_length)
    for number, tokens in enumerate(tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]):
        problem = _question_problem(tokenizer, len(tokens), contexts[number], max_length)
        if problem:
            raise TaskDataError(f"{where}, row {first + number + 1}: {problem}, or filter such questions out")
    encoded = tokenizer(
        questions,
        list(contexts),
        truncation="only_second",
        max_length=max_length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for number, row in enumerate(encoded["overflow_to_sample_mapping"]):
        places = np.asarray(encoded["offset_mapping"][number], dtype=np.int64).copy()
        places[[part != 1 for part in encoded.sequence_ids(number)]] = -1
        windows.append((first + row, places))
    return encoded, windows


def question_problem(tokenizer: Any, question: str, context: str, max_length: int) -> str:
    """Why a question leaves too little room for its context, and what to do about it; empty if it does not."""
    tokens = tokenizer(question.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    return _question_problem(tokenizer, len(tokens), context, max_length)


def _question_problem(tokenizer: Any, tokens: int, context: str, max_length: int) -> str:
    overlap = window_overlap(max_length)
    left = max_length - tokenizer.num_special_tokens_to_add(pair=True) - tokens
    if left > overlap:
        return ""
    length = len(tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"])
    if length <= left:
        return ""
    enough = max_length + 1
    while enough - max_length + left <= min(window_overlap(enough), length - 1):
        enough += 1
    return (
        f"the question has {tokens} tokens, which leaves room for {max(left, 0)} of the {length} tokens of the "
        f"context with max_length={max_length}; windows need at least {overlap + 1}: raise max_length to {enough} or "
        "more"
    )


def answer_span(places: np.ndarray, answer: Mapping[str, Any]) -> tuple[int, int]:
    """First and last token of the first answer, or `(0, 0)`, the window's first token, if it lacks the answer."""
    if not any(answer["text"][:1]):
        return 0, 0
    start = answer["answer_start"][0]
    end = start + len(answer["text"][0])
    holds_start = np.flatnonzero((places[:, 0] <= start) & (places[:, 1] > start) & (places[:, 0] >= 0))
    holds_end = np.flatnonzero((places[:, 0] < end) & (places[:, 1] >= end) & (places[:, 0] >= 0))
    if not len(holds_start) or not len(holds_end):
        return 0, 0
    return int(holds_start[0]), int(holds_end[-1])


def best_answers(
    contexts: Sequence[str], windows: Sequence[Window], logits: Iterable[np.ndarray], *, unanswerable: bool
) -> list[str]:
    """For each question the best span over all windows of its context, or "" for no answer; see `best_spans`."""
    spans = best_spans(len(contexts), windows, logits, unanswerable=unanswerable)
    return [
        "" if span is None else text[span.start : span.end] for text, (span, _) in zip(contexts, spans, strict=True)
    ]


def best_spans(
    questions: int, windows: Sequence[Window], logits: Iterable[np.ndarray], *, unanswerable: bool
) -> list[tuple[Span | None, float]]:
    """For each question the best span over all windows of its context, or `None`, and the probability of no answer.

    "No answer" is the span of the first token; it wins if it beats the best span in every window. Windows without the
    answer are trained on that span as well, so it is ignored unless some questions are unanswerable.

    Args:
        questions: Number of questions.
        windows: The windows of all contexts.
        logits: For each window the scores of the first and last token, `[n, 2]`.
        unanswerable: Whether "no answer" may be predicted.
    """
    best: list[Span | None] = [None] * questions
    none = np.full(questions, np.inf)
    nothing = np.ones(questions)
    for number, ((row, places), scored) in enumerate(zip(windows, logits, strict=True)):
        scored = scored[: len(places)]
        shares = np.exp(scored - scored.max(axis=0))
        shares /= shares.sum(axis=0)
        none[row] = min(none[row], scored[0].sum())
        nothing[row] = min(nothing[row], shares[0].prod())
        inside = np.flatnonzero(places[:, 0] >= 0)
        if not len(inside):
            continue
        start, end = (scored[inside, side] for side in (0, 1))
        total = start[:, None] + end[None, :]
        length = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
        total = np.where((length >= 0) & (length < _LONGEST_ANSWER), total, -np.inf)
        first, last = np.unravel_index(total.argmax(), total.shape)
        found = best[row]
        if found is None or total[first, last] > found.total:
            first_token, last_token = inside[first], inside[last]
            best[row] = Span(
                start=int(places[first_token, 0]),
                end=int(places[last_token, 1]),
                total=float(total[first, last]),
                probability=float(shares[first_token, 0] * shares[last_token, 1]),
                window=number,
            )
    return [
        (None if span is None or (unanswerable and span.total < least) else span, float(rest))
        for span, least, rest in zip(best, none, nothing, strict=True)
    ]
