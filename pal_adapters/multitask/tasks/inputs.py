"""Examples as encoder inputs: texts, pairs, choices and lists of words, for training and for predictions alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from .types import Segments, TaskDataError, TaskFields

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The outputs of a tokenizer that models read."""


def segments_of(task: TaskFields, rows: Sequence[Mapping[str, Any]], where: str, first: int = 0) -> list[Segments]:
    """The encoder inputs of some examples as text; those of an example are adjacent.

    Args:
        task: Their task.
        rows: The examples.
        where: What error messages call them.
        first: Index of the first of them among all examples.

    Raises:
        TaskDataError: For an example that cannot be turned into text.
    """
    segments: list[Segments] = []
    for number, row in enumerate(rows):
        try:
            found = list(task.segments(row))
        except Exception as error:  # a custom `render` may raise anything; the user needs to know for which example
            reason = error if isinstance(error, TaskDataError) else f"render raises {type(error).__name__}: {error}"
            raise TaskDataError(f"{where}, row {first + number + 1}: {reason}") from error
        problem = _problem(found, task.num_choices, paired=segments[0][1] is not None if segments else None)
        if problem:
            raise TaskDataError(f"{where}, row {first + number + 1}: render {problem}")
        segments += found
    return segments


def _problem(found: Sequence[Any], count: int, *, paired: bool | None) -> str:
    """What is wrong with the encoder inputs of an example; empty if they are right."""
    for one in found:
        pair = isinstance(one, (tuple, list)) and len(one) == 2
        if not pair or not isinstance(one[0], str) or not isinstance(one[1], (str, type(None))):
            return f"returns {one!r:.40}, which is neither a pair of texts nor (text, None)"
        if paired is not None and paired is not (one[1] is not None):
            return "returns a pair of texts for some inputs and a single text for others"
        paired = one[1] is not None
    return "" if len(found) == count else f"returns {len(found)} encoder inputs instead of {count}"


def expanded(task: TaskFields, rows: datasets.Dataset, where: str) -> datasets.Dataset:
    """The examples to encode, see `Task.expand`.

    Raises:
        TaskDataError: If `expand` returns anything but a `datasets.Dataset`.
    """
    found = rows if task.expand is None else task.expand(rows)
    if not isinstance(found, datasets.Dataset):
        raise TaskDataError(f"{where}: expand returns a {type(found).__name__}, not a datasets.Dataset")
    return found


def encode_segments(tokenizer: Any, segments: Sequence[Segments], max_length: int) -> Any:
    """The tokens of some encoder inputs; in a pair, the longer text is truncated first."""
    first = [a for a, _ in segments]
    texts = (first, [b for _, b in segments]) if segments[0][1] is not None else (first,)
    return tokenizer(*texts, truncation=True, max_length=max_length)


def first_tokens(word_ids: Sequence[int | None], words: int) -> np.ndarray:
    """The first token of each word `[words]`, -1 for words without one."""
    places = np.full(words, -1, dtype=np.int64)
    for place, word in enumerate(word_ids):
        if word is not None and places[word] < 0:
            places[word] = place
    return places
