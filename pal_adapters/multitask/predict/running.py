"""Runs the pieces of requests through a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batching import batches
from .encoding import Piece
from .engines import Engine, device_of
from .served import ServedTasks


def run_pieces(
    pieces: Sequence[Piece], tasks: ServedTasks, engine: Engine, limit: int, done: Callable[[int], Any]
) -> list[np.ndarray]:
    """The output of each piece: its logits, or for a language model the scores of its continuation.

    Args:
        pieces: The pieces.
        tasks: Their tasks.
        engine: The model.
        limit: Largest number of tokens in a batch, with padding.
        done: Called with the number of pieces of each batch that was run.
    """
    outputs: list[np.ndarray | None] = [None] * len(pieces)
    for numbers in batches(pieces, tasks, limit, device_of(engine).type):
        batch = [pieces[number] for number in numbers]
        for number, output in zip(numbers, _run_batch(batch, tasks, engine), strict=True):
            outputs[number] = output
        done(len(numbers))
    return [output for output in outputs if output is not None]


def _run_batch(batch: Sequence[Piece], tasks: ServedTasks, engine: Engine) -> list[np.ndarray]:
    features = [{"task": piece.request.task, "inputs": piece.inputs, "label": None} for piece in batch]
    inputs = tasks.collator(features)
    names = list(tasks.collator.heads)
    ids = [names[number] for number in inputs.pop("task_ids")]
    device = device_of(engine)
    inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    logits = engine.logits(ids, inputs)
    taken = dict.fromkeys(logits, 0)
    found = []
    for piece in batch:
        task = piece.request.task
        rows = logits[task][taken[task]]
        taken[task] += 1
        if tasks[task].head.reads_tokens:
            rows = rows[-piece.length :] if tasks.collator.left else rows[: piece.length]
        if tasks[task].task.kind == "language_modeling":
            rows = token_scores(rows, piece)
        found.append(rows)
    return [rows.float().cpu().numpy() for rows in found]


def token_scores(logits: Tensor, piece: Piece) -> Tensor:
    """The log-probability of each token of a continuation, and whether it is the most probable one, `[m, 2]`.

    Args:
        logits: Logits of all tokens `[n, v]`.
        piece: The prompt and the continuation.
    """
    assert piece.places is not None
    first = int(piece.places[0])
    wanted = torch.as_tensor(piece.inputs[0]["input_ids"][first:], device=logits.device)
    scored = logits[first - 1 : -1].float()  # each token is predicted by the one before
    found = scored.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    return torch.stack([found, (scored.argmax(-1) == wanted).float()], dim=-1)
