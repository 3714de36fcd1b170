"""Questions over long contexts: the context is cut into overlapping windows, each of which is encoded on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .types import TaskDataError

_LONGEST_ANSWER = 30
_OVERLAP = 128

Window = tuple[int, np.ndarray]
"""The example that a window is of, and for each token its characters in the context `[n, 2]`, -1 outside it."""


def _overlap(max_length: int) -> int:
    """Tokens that consecutive windows share."""
    return min(_OVERLAP, max_length // 4)


def encode_questions(
    tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], max_length: int, where: str, first: int
) -> tuple[Any, list[Window]]:
    """The encoded windows of some questions, and what each window shows.

    Args:
        tokenizer: A fast tokenizer.
        questions: The questions.
        contexts: Their contexts.
        max_length: Tokens of a window.
        where: What error messages call the examples.
        first: Index of the first of them among all examples.

    Raises:
        TaskDataError: For a question that leaves too little room for its context.
    """
    questions = [question.lstrip() for question in questions]
    overlap = _overlap(max_length)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    for number, tokens in enumerate(tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]):
        left = room - len(tokens)
        if left > overlap:
            continue
        context = tokenizer(contexts[number], add_special_tokens=False, verbose=False)["input_ids"]
        if len(context) > left:
            enough = max_length + 1
            while enough - max_length + left <= min(_overlap(enough), len(context) - 1):
                enough += 1
            raise TaskDataError(
                f"{where}, row {first + number + 1}: the question has {len(tokens)} tokens, which leaves room for "
                f"{max(left, 0)} of the {len(context)} tokens of the context with max_length={max_length}; windows "
                f"need at least {overlap + 1}: raise max_length to {enough} or more, or filter such questions out"
            )
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


def answer_span(places: np.ndarray, answer: Mapping[str, Any]) -> tuple[int, int]:
    """First and last token of the first answer, or twice the first token of the window if it lacks the answer."""
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
    contexts: Sequence[str], windows: Sequence[Window], logits: np.ndarray, *, unanswerable: bool
) -> list[str]:
    """For each question the best span over all windows of its context, or "" for no answer.

    "No answer" is the span of the first token; it wins if it beats the best span in every window. Windows without the
    answer are trained on that span as well, so it is ignored unless some questions are unanswerable.

    Args:
        contexts: The contexts, one for each question.
        windows: The windows of all contexts.
        logits: Scores of the first and last token, `[windows, n, 2]`.
        unanswerable: Whether "no answer" may be predicted.
    """
    best = [(-np.inf, "")] * len(contexts)
    none = np.full(len(contexts), np.inf if unanswerable else -np.inf)
    for (row, places), scored in zip(windows, logits, strict=True):
        none[row] = min(none[row], scored[0].sum())
        inside = np.flatnonzero(places[:, 0] >= 0)
        if not len(inside):
            continue
        start, end = (scored[inside, side] for side in (0, 1))
        total = start[:, None] + end[None, :]
        length = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
        total = np.where((length >= 0) & (length < _LONGEST_ANSWER), total, -np.inf)
        first, last = np.unravel_index(total.argmax(), total.shape)
        if total[first, last] > best[row][0]:
            text = contexts[row][places[inside[first], 0] : places[inside[last], 1]]
            best[row] = (float(total[first, last]), text)
    return [text if total >= least else "" for (total, text), least in zip(best, none, strict=True)]
