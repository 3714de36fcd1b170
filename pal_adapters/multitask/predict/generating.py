"""Continues texts with a language model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .encoding import Piece, new_tokens
from .engines import Engine, device_of
from .predictions import TextPrediction
from .served import ServedTask


def generate(
    pieces: Sequence[Piece],
    served: ServedTask,
    engine: Engine,
    tokenizer: Any,
    limit: int,
    done: Callable[[int], Any],
) -> list[TextPrediction]:
    """Decodes greedily, up to the end-of-text token or the requested number of tokens.

    Prompts of the same length run together, so that no padding shifts positions.

    Args:
        pieces: The prompts, all of one task.
        served: Their task.
        engine: The model.
        tokenizer: Its tokenizer.
        limit: Largest number of tokens in a batch.
        done: Called with the number of pieces of each batch that was run.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for number, piece in enumerate(pieces):
        groups.setdefault((piece.length, new_tokens(piece.request, served)), []).append(number)
    found: list[TextPrediction | None] = [None] * len(pieces)
    for (length, new), numbers in groups.items():
        size = max(1, limit // (length + new))
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            prompts = torch.stack([torch.as_tensor(pieces[number].inputs[0]["input_ids"]) for number in batch])
            tokens, scores = _continue(served.task.name, engine, prompts, new, tokenizer.eos_token_id)
            for number, row, scored in zip(batch, tokens, scores, strict=True):
                found[number] = TextPrediction(
                    task=served.task.name,
                    text=tokenizer.decode(row, skip_special_tokens=True),
                    generated=True,
                    log_probability=float(scored.sum()),
                    tokens=len(row),
                    greedy=True,
                    array=scored.double().numpy(),
                )
            done(len(batch))
    return [prediction for prediction in found if prediction is not None]


def _continue(
    task: str, engine: Engine, prompts: Tensor, new: int, end: int | None
) -> tuple[list[list[int]], list[Tensor]]:
    """The new tokens of each prompt and their log-probabilities, with the end-of-text token if there is one."""
    rows, length = prompts.shape
    device = device_of(engine)
    tokens = prompts.to(device)
    mask = torch.ones(rows, length + new, dtype=torch.long, device=device)
    argument, cache = engine.cache_argument(task), DynamicCache()
    scores: list[Tensor] = []
    running = torch.ones(rows, dtype=torch.bool, device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    for step in range(new):
        seen = length + step
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask[:, :seen]}
        if argument is not None:
            inputs |= {"input_ids": tokens if not step else tokens[:, -1:], argument: cache, "use_cache": True}
        logits = engine.logits([task] * rows, inputs)[task][:, -1].float()
        score, token = logits.log_softmax(-1).max(-1)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        scores.append(score)
        lengths += running
        running &= token != end if end is not None else True
        if not running.any():
            break
    made = tokens[:, length:].cpu().tolist()
    scored = torch.stack(scores, dim=1).cpu()
    counts = lengths.tolist()
    return [row[:count] for row, count in zip(made, counts, strict=True)], [
        row[:count] for row, count in zip(scored, counts, strict=True)
    ]
