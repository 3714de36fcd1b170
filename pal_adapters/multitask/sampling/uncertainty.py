"""MT-uncertainty sampling: train on the candidates about which the model is most uncertain."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pal_adapters.checks import require_int, require_one_of
from pal_adapters.errors import ConfigError

Score = Literal["code", "paper"]
Regression = Mapping[str, "str | float"]

DEFAULT_PROXIES = {"stsb": "mrpc"}
"""The task whose scores a regression task takes, as it has no entropy, if both are present."""

_EPS = 1e-5


class Uncertainty(NamedTuple):
    """The uncertainty of one task's candidates.

    Attributes:
        entropy: `[n]`, `H_i = -sum_c p_ic ln p_ic`.
        normalised: `[n]`, `u_i = H_i / (ln C + 1e-5)`; 0 for a regression.
        score: `[n]`, compared across all candidates.
    """

    entropy: Tensor
    normalised: Tensor
    score: Tensor


class Selection(NamedTuple):
    """The chosen candidates.

    Attributes:
        indices: `[b]`, positions in the concatenated candidates of all tasks, most uncertain first.
        scores: `[b]`, their scores.
        rows: The same by task: positions within the task's own candidates.
    """

    indices: Tensor
    scores: Tensor
    rows: dict[str, list[int]]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _regression_rule(logits: Mapping[str, Tensor], given: Regression | None) -> dict[str, str | float]:
    tasks = [task for task, values in logits.items() if values.shape[-1] == 1]
    if given is None:
        by_plain = {_plain(task): task for task in logits}
        proxies = ((task, by_plain.get(DEFAULT_PROXIES.get(_plain(task), ""))) for task in tasks)
        return {task: proxy for task, proxy in proxies if proxy is not None}
    for task, rule in given.items():
        if task in logits and task not in tasks:
            raise ConfigError(
                f"regression={dict(given)!r} is not allowed: {task!r} has {logits[task].shape[-1]} classes and is "
                "scored by its entropy."
            )
        number = isinstance(rule, (int, float)) and not isinstance(rule, bool)
        if task in logits and not number and (rule not in logits or rule in tasks):
            raise ConfigError(
                f"regression={dict(given)!r} is not allowed: {rule!r} is not a classification task of this batch; use "
                f"one of {[t for t in logits if t not in tasks]} or a number."
            )
    return {task: rule for task, rule in given.items() if task in logits}


@torch.no_grad()
def uncertainty(
    logits: Mapping[str, Tensor], *, score: Score = "code", regression: Regression | None = None
) -> dict[str, Uncertainty]:
    r"""Scores of the candidates of all tasks.

    $$u_i = \frac{H_i}{\ln C_t + 10^{-5}}, \qquad U_i = u_i \frac{\bar u_t}{\max_s \bar u_s}$$

    with the entropy `H_i` of the softmax and the mean `u_t` over the task's candidates. `score="paper"` is
    `H_i / (H' max_s mean(H_s))`, with `H'` the entropy of the uniform distribution. It lacks the mean of the
    candidate's own task, which makes the code favour uncertain tasks.

    Source: Pilault et al., ICLR 2021, and the released code.

    Args:
        logits: `[n_t, C_t]` of the candidates of each task; one column is a regression.
        score: Which of the two formulas.
        regression: For a regression task a number, or another task whose scores its examples take one by one, as long
            as both have candidates. By default STS-B takes those of MRPC if both are present. Examples without a rule
            score 0 and are practically never chosen.

    Raises:
        ConfigError: For logits of the wrong shape, or a rule that names no task.
    """
    require_one_of("score", score, ("code", "paper"))
    if not logits:
        raise ConfigError("logits={} is not allowed: pass the logits of at least one task.")
    for task, values in logits.items():
        if values.dim() != 2 or values.shape[1] < 1:
            raise ConfigError(f"logits of {task!r} have shape {list(values.shape)}: pass [candidates, classes].")
    rule = _regression_rule(logits, regression)
    entropies, normalised = {}, {}
    for task, values in logits.items():
        log_p = values.float().log_softmax(-1)
        entropies[task] = -(log_p.exp() * log_p).sum(-1)
        normalised[task] = entropies[task] / (math.log(values.shape[-1]) + _EPS)
    scores = _code_scores(normalised) if score == "code" else _paper_scores(entropies, normalised)
    own = dict(scores)
    for task, value in rule.items():
        changed = own[task].clone()
        if isinstance(value, str):
            both = min(len(changed), len(own[value]))
            changed[:both] = own[value][:both]
        else:
            changed.fill_(float(value))
        scores[task] = changed
    return {task: Uncertainty(entropies[task], normalised[task], scores[task]) for task in logits}


def _means(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {task: v.mean() if len(v) else v.sum() for task, v in values.items()}


def _code_scores(normalised: Mapping[str, Tensor]) -> dict[str, Tensor]:
    means = _means(normalised)
    largest = torch.stack(list(means.values())).max().clamp(min=torch.finfo(torch.float32).tiny)
    return {task: u * (means[task] / largest) for task, u in normalised.items()}


def _paper_scores(entropies: Mapping[str, Tensor], normalised: Mapping[str, Tensor]) -> dict[str, Tensor]:
    largest = torch.stack(list(_means(entropies).values())).max().clamp(min=torch.finfo(torch.float32).tiny)
    return {task: u / largest for task, u in normalised.items()}


def select_uncertain(
    logits: Mapping[str, Tensor], size: int, *, score: Score = "code", regression: Regression | None = None
) -> Selection:
    """The `size` candidates with the highest scores, or all if there are fewer.

    Args:
        logits: `[n_t, C_t]` of the candidates of each task.
        size: `b`.
        score: See `uncertainty`.
        regression: See `uncertainty`.

    Examples:
        >>> flat, sharp = torch.zeros(1, 2), torch.tensor([[9.0, 0.0]])
        >>> select_uncertain({"rte": sharp, "mrpc": flat}, 1).rows
        {'mrpc': [0]}
    """
    require_int("size", size, minimum=1)
    found = uncertainty(logits, score=score, regression=regression)
    scores = torch.cat([u.score for u in found.values()])
    top = scores.topk(min(size, len(scores)))
    rows: dict[str, list[int]] = {}
    starts, start = [], 0
    for task, values in logits.items():
        starts.append((start, task))
        start += len(values)
    for index in top.indices.tolist():
        first, task = next((s, t) for s, t in reversed(starts) if s <= index)
        rows.setdefault(task, []).append(index - first)
    return Selection(top.indices, top.values, rows)
