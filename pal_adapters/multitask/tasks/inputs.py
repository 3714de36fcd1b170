"""Examples as encoder inputs: texts, pairs, choices and lists of words, for training and for predictions alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .types import Segments, TaskDataError, TaskFields

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The outputs of a tokenizer that models read."""


def segments_of(task: TaskFields, rows: Sequence[Mapping[str, Any]], where: str, first: int = 0) -> list[Segments]:
    """The encoder inputs of some examples as text, those of an example next to each other.

    Args:
        task: Their task.
        rows: The examples.
        where: What error messages call them.
        first: Index of the first of them among all examples.

    Raises:
        TaskDataError: For an example that cannot be made text.
    """
    segments: list[Segments] = []
    for number, row in enumerate(rows):
        try:
            segments += task.segments(row)
        except TaskDataError as error:
            raise TaskDataError(f"{where}, row {first + number + 1}: {error}") from error
    if len(segments) != len(rows) * task.num_choices:
        raise TaskDataError(f"{where}: {len(segments)} encoder inputs for {len(rows)} rows")
    return segments


def encode_segments(tokenizer: Any, segments: Sequence[Segments], max_length: int) -> Any:
    """The tokens of some encoder inputs; of a pair, the longer text is truncated first."""
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
