"""Requests as encoder inputs, with what is needed to read the outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pal_adapters.multitask.tasks.inputs import INPUTS, encode_segments, first_tokens, segments_of
from pal_adapters.multitask.tasks.types import TaskDataError
from pal_adapters.multitask.tasks.windows import encode_questions, question_problem, window_overlap

from .requests import Request
from .served import ServedTask

Inputs = Mapping[str, np.ndarray]

_WORD = re.compile(r"\w+|[^\w\s]")
"""A word or a punctuation mark, as in the usual data sets for tagging."""


@dataclass(frozen=True)
class Piece:
    """What goes through the model as one example: a request, or one window of it.

    Args:
        request: Its request.
        inputs: Its encoder inputs; one for each choice, otherwise one.
        places: For a window of a text of words, the first token of each word, -1 for words outside `[words]`. For a
            window of a context, the characters of each token `[n, 2]`, see `windows.Window`. For a language model, the
            number of tokens in front of the continuation `[1]`.
    """

    request: Request
    inputs: tuple[Inputs, ...]
    places: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Number of tokens of its longest encoder input."""
        return max(len(row["input_ids"]) for row in self.inputs)


@dataclass(frozen=True)
class Words:
    """The words of a text and their characters in it."""

    text: str
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


def words_of(request: Request, column: str) -> Words:
    """The words of a request: those given, joined by spaces, or those of its text."""
    given = request.row[column if column in request.row else "text"]
    if isinstance(given, str):
        found = list(_WORD.finditer(given))
        return Words(given, tuple(match.group() for match in found), tuple(match.span() for match in found))
    starts = np.cumsum([0, *(len(word) + 1 for word in given)])
    spans = tuple((int(start), int(start) + len(word)) for start, word in zip(starts, given, strict=False))
    return Words(" ".join(given), tuple(given), spans)


def encode_requests(requests: Sequence[Request], served: ServedTask, tokenizer: Any) -> list[Piece]:
    """The pieces of some requests of one task, with those of each request next to each other.

    Raises:
        RequestError: For a request whose text cannot be encoded.
    """
    encode = {
        "token_tagging": _encode_words,
        "span_qa": _encode_question,
        "language_modeling": _encode_continuation,
    }.get(served.task.kind)
    if encode is None:
        return _encode_texts(requests, served, tokenizer)
    pieces = [piece for request in requests for piece in encode(request, served, tokenizer)]
    for piece in pieces:
        _require_tokens(piece)
    return pieces


def _encode_texts(requests: Sequence[Request], served: ServedTask, tokenizer: Any) -> list[Piece]:
    segments = []
    for request in requests:
        try:
            segments += segments_of(served.task, [request.row], "the text cannot be made")
        except (TaskDataError, KeyError, TypeError, ValueError) as error:  # a custom `render` may raise any of these
            raise request.error(f"its text cannot be made ({error!r:.200}).") from error
    encoded = encode_segments(tokenizer, segments, served.description.max_length)
    choices = served.task.num_choices
    rows = [_inputs(encoded, number) for number in range(len(segments))]
    pieces = [
        Piece(request, tuple(rows[number * choices : (number + 1) * choices]))
        for number, request in enumerate(requests)
    ]
    for piece in pieces:
        _require_tokens(piece)
    return pieces


def _encode_words(request: Request, served: ServedTask, tokenizer: Any) -> list[Piece]:
    found = words_of(request, served.description.text_columns[0])
    if not found.words:
        return []
    longest = served.description.max_length
    encoded = tokenizer(
        [list(found.words)],
        is_split_into_words=True,
        truncation=True,
        max_length=longest,
        stride=window_overlap(longest),
        return_overflowing_tokens=True,
    )
    pieces = []
    for number in range(len(encoded["input_ids"])):
        places = first_tokens(encoded.word_ids(number), len(found.words))
        pieces.append(Piece(request, (_inputs(encoded, number),), places))
    return pieces


def _encode_question(request: Request, served: ServedTask, tokenizer: Any) -> list[Piece]:
    question, context = (request.row[column] for column in served.description.text_columns)
    longest = served.description.max_length
    if problem := question_problem(tokenizer, question, context, longest):
        raise request.error(f"{problem}, or shorten the question.")
    encoded, windows = encode_questions(tokenizer, [question], [context], longest, "", 0)
    return [Piece(request, (_inputs(encoded, number),), places) for number, (_, places) in enumerate(windows)]


def _encode_continuation(request: Request, served: ServedTask, tokenizer: Any) -> list[Piece]:
    """The prompt and, if it is given, the continuation; a prompt that is too long loses its beginning."""
    longest = served.description.max_length
    prompt = _prompt_tokens(tokenizer, request.row[served.description.text_columns[0]])
    continuation = []
    if "continuation" in request.row:
        continuation = tokenizer(request.row["continuation"], add_special_tokens=False, verbose=False)["input_ids"]
        if not continuation:
            raise request.error("the tokenizer makes no token of the continuation.")
    room = longest - (len(continuation) or new_tokens(request, served))
    if room < 1:
        much = f"the continuation has {len(continuation)} tokens" if continuation else "'max_new_tokens' is too large"
        raise request.error(f"{much}, but max_length is {longest}, and the text needs at least one token.")
    if not prompt:
        raise request.error("the tokenizer makes no token of the text, and there is nothing to continue.")
    prompt = prompt[-room:]
    tokens = np.asarray([*prompt, *continuation], dtype=np.int64)
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    return [Piece(request, (inputs,), np.asarray([len(prompt)]))]


def new_tokens(request: Request, served: ServedTask) -> int:
    """The largest number of tokens to generate."""
    return int(request.row.get("max_new_tokens", min(20, max(1, served.description.max_length // 2))))


def _prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with special tokens in front of it and without those behind it."""
    tokens = list(tokenizer(text, verbose=False)["input_ids"])
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None, *plain[-1:]}
    while tokens and tokens[-1] in ends:
        tokens.pop()
    return tokens


def _inputs(encoded: Any, number: int) -> Inputs:
    return {name: np.asarray(encoded[name][number], dtype=np.int64) for name in INPUTS if name in encoded}


def _require_tokens(piece: Piece) -> None:
    if not all(len(row["input_ids"]) for row in piece.inputs):
        raise piece.request.error("the tokenizer makes no token of the text.")
