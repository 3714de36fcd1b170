"""Turns the outputs of a model into named results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pal_adapters.multitask.metrics.builtin import entities
from pal_adapters.multitask.tasks.windows import best_spans

from .encoding import Piece, words_of
from .predictions import (
    AnswerPrediction,
    ChoicePrediction,
    EntitiesPrediction,
    Entity,
    LabelPrediction,
    LabelsPrediction,
    NumberPrediction,
    Prediction,
    TextPrediction,
)
from .requests import Request
from .served import ServedTask

Outputs = Sequence[np.ndarray]
"""The logits of each piece of a request, `[c]` or `[n, c]`; for a language model see `running.token_scores`."""


def decode(request: Request, pieces: Sequence[Piece], outputs: Outputs, served: ServedTask) -> Prediction:
    """The result of a request, with its array.

    Args:
        request: The request.
        pieces: Its pieces.
        outputs: Their outputs.
        served: Its task.
    """
    return _DECODERS[served.task.kind](request, pieces, [output.astype(np.float64) for output in outputs], served)


def _label(request: Request, pieces: Sequence[Piece], outputs: Outputs, served: ServedTask) -> Prediction:
    shares, names = _softmax(outputs[0]), served.description.label_names
    best = int(shares.argmax())
    return LabelPrediction(
        task=request.task, label=names[best], score=float(shares[best]), scores=_named(names, shares), array=shares
    )


def _labels(request: Request, pieces: Sequence[Piece], outputs: Outputs, served: ServedTask) -> Prediction:
    shares, names = 1 / (1 + np.exp(-outputs[0])), served.description.label_names
    least = np.asarray(served.description.thresholds or [0.5] * len(names))
    reached = [int(number) for number in np.argsort(-shares, kind="stable") if shares[number] >= least[number]]
    return LabelsPrediction(
        task=request.task,
        labels=tuple(names[number] for number in reached),
        scores=_named(names, shares),
        array=shares,
    )


def _number(request: Request, pieces: Sequence[Piece], outputs: Outputs, served: ServedTask) -> Prediction:
    values = np.atleast_1d(outputs[0])
    named = _named(served.description.label_names, values)
    return NumberPrediction(task=request.task, value=float(values[0]), values=named, array=values)


def _choice(request: Request, pieces: Sequence[Piece], outputs: Outputs, served: ServedTask) -> Prediction:
    shares, names = _softmax(outputs[0]), served.description.label_names
    best = int(shares.argmax())
    text = request.row.get(names[best])
    return ChoicePrediction(
        task=request.task,
        choice=names[best],
        text=text if isinstance(text, str) else None,
        score=float(shares[best]),
        scores=_named(names, shares),
        array=shares,
    )


def _entities(request: Request, pieces: Sequence[Piece], outputs: Outputs, served: ServedTask) -> Prediction:
    found, names = words_of(request, served.description.text_columns[0]), served.description.label_names
    shares = np.full((len(found.words), len(names)), np.nan)
    best = np.full(len(found.words), -np.inf)
    for number, (piece, logits) in enumerate(zip(pieces, outputs, strict=True)):
        assert piece.places is not None
        seen = np.flatnonzero(piece.places >= 0)
        places = piece.places[seen]
        # Of several windows, the one in which a word has the most context; a window may begin within a word.
        context = np.minimum(places, len(logits) - 1 - places).astype(float)
        if number and len(context):
            context[0] = -1
        better = context > best[seen]
        best[seen[better]] = context[better]
        shares[seen[better]] = _softmax(logits[places[better]])
    tags = tuple("O" if np.isnan(row[0]) else names[int(row.argmax())] for row in shares)
    scores = [0.0 if np.isnan(row[0]) else float(row.max()) for row in shares]
    if any(re.match(r"[BI]-", name) for name in names):
        parts = entities(tags)
    else:
        parts = [(tag, number, number + 1) for number, tag in enumerate(tags) if tag != "O"]
    return EntitiesPrediction(
        task=request.task,
        text=found.text,
        words=found.words,
        labels=tags,
        entities=tuple(
            Entity(
                label=label,
                text=found.text[found.spans[first][0] : found.spans[last - 1][1]],
                start=found.spans[first][0],
                end=found.spans[last - 1][1],
                score=float(np.mean(scores[first:last])),
            )
            for label, first, last in parts
        ),
        array=shares,
    )


def _answer(request: Request, pieces: Sequence[Piece], outputs: Outputs, served: ServedTask) -> Prediction:
    context = request.row[served.description.text_columns[1]]
    windows = [(0, piece.places) for piece in pieces if piece.places is not None]
    unanswerable = served.description.unanswerable
    span, nothing = best_spans(1, windows, outputs, unanswerable=unanswerable)[0]
    if span is None:
        return AnswerPrediction(task=request.task, answer=None, start=None, end=None, score=nothing, array=outputs[0])
    return AnswerPrediction(
        task=request.task,
        answer=context[span.start : span.end],
        start=span.start,
        end=span.end,
        score=span.probability,
        array=outputs[span.window],
    )


def _continuation(request: Request, pieces: Sequence[Piece], outputs: Outputs, served: ServedTask) -> Prediction:
    scores, greedy = outputs[0].T
    return TextPrediction(
        task=request.task,
        text=request.row["continuation"],
        generated=False,
        log_probability=float(scores.sum()),
        tokens=len(scores),
        greedy=bool(greedy.all()),
        array=scores,
    )


_DECODERS: Mapping[str, Callable[[Request, Sequence[Piece], Outputs, ServedTask], Prediction]] = {
    "single_label": _label,
    "multi_label": _labels,
    "regression": _number,
    "multiple_choice": _choice,
    "token_tagging": _entities,
    "span_qa": _answer,
    "language_modeling": _continuation,
}


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def _named(names: Sequence[str], values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
