"""Learned scales of several sources (ScaLearn) and attention over sources (AdapterFusion), in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.methods.released import shared_scalearn_penalty

Ablation = Literal["mean", "softmax"]


class Scales(nn.Module):
    r"""Coefficients `omega` of `S` sources, `[S, d]` (one per channel) or `[S, 1]` (one per source).

    $$\omega \sim N(c / S, \sigma^2)$$

    There is no softmax and no constraint on the sum. Source: Frohmann et al., ScaLearn, Findings of ACL 2024.

    Args:
        sources: `S`.
        width: `d`, or 1.
        init_scale: `c`; the reported runs use 2.
        init_std: `sigma`.
        dropout: probability of dropping an entry of `omega` in training; the others are scaled by `1 / (1 - p)`. Each
            call draws one mask for all tokens and examples.
        ablation: "mean" divides `omega` by its sum over the sources, "softmax" takes the softmax over the sources,
            both per channel and after dropout; None for the method itself.
    """

    def __init__(
        self,
        sources: int,
        width: int,
        *,
        init_scale: float = 2.0,
        init_std: float = 1e-3,
        dropout: float = 0.3,
        ablation: Ablation | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.ablation = ablation
        self.init_scale = init_scale
        self.init_std = init_std
        # The mean absolute coefficient before training.
        self.start: float | None = abs(init_scale if ablation is None else 1.0) / sources
        self.omega = nn.Parameter(torch.empty(sources, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `omega` from the global random state."""
        nn.init.normal_(self.omega, self.init_scale / self.omega.shape[0], self.init_std)

    def forward(self) -> Tensor:
        """The coefficients of this call, `[S, d]` or `[S, 1]`."""
        return self.coefficients(self.omega)

    def coefficients(self, omega: Tensor) -> Tensor:
        """The coefficients from an `omega` that may be registered elsewhere, because places can share one."""
        return normalise(F.dropout(omega, self.dropout, self.training), self.ablation)


def normalise(omega: Tensor, ablation: Ablation | None) -> Tensor:
    """`omega` `[S, ...]`, normalised over the sources as in an ablation.

    If dropout has set all entries of a channel to 0, "mean" gives 0 (the authors' code: NaN).
    """
    if ablation == "mean":
        total = omega.sum(0, keepdim=True)
        return omega / total.masked_fill(total == 0, 1.0)
    if ablation == "softmax":
        return omega.softmax(0)
    return omega


def combine(coefficients: Tensor, outputs: Tensor) -> Tensor:
    r"""$\sum_s \omega_s \odot a_s$: `[S, d]` or `[S, 1]` and `[..., S, d]` give `[..., d]`."""
    return (coefficients.to(outputs.dtype) * outputs).sum(-2)


def regularization(omegas: Sequence[Tensor], weight: float, form: str = "mean") -> Tensor:
    r"""A penalty that pulls the mean coefficient of each source towards one.

        $$\frac{\lambda}{S} \sum_l \sum_s \Big(1 - \frac{1}{d} \sum_i \omega^{(l)}_{s,i}\Big)^2$$

    Args:
        omegas: one `[S, d]` or `[S, 1]` per block, or a single one that all blocks share.
        weight: `lambda`.
        form: "mean" for the formula above; for "code" see `pal_adapters.methods.released`.

    Returns:
        A scalar in float32.
    """
    total = torch.zeros((), device=omegas[0].device)
    for omega in omegas:
        omega = omega.float()
        mean = (1 - omega.mean(1)).square().sum() / omega.shape[0]
        total = total + (shared_scalearn_penalty(omega) if form == "code" else mean)
    return weight * total


class SourceAttention(nn.Module):
    r"""AdapterFusion: each token attends over the outputs of the sources for it.

    $$q = Q u + b_q, \quad k_s = K a_s + b_k, \quad v_s = V a_s$$
    $$c = \sum_s \mathrm{softmax}_s(D(q \cdot k_s) / \tau) \, v_s$$

    `u` `[b, n, d]` is the query, `a_s` the source's output without a residual; `Q`, `K` `[d, d]` with biases, `V`
    `[d, d]` without. Scores are not divided by `sqrt(d)`; `D` is dropout on the scores. `V` starts at 1 on the
    diagonal and 1e-6 elsewhere, `Q` and `K` at N(0, 0.02^2). Source: Pfeiffer et al., AdapterFusion, EACL 2021; the
    same module is `BertFusion` in adapters.

    Args:
        width: `d`.
        dropout: of `D`.
        value: whether there is a `V`; without one, the outputs of the sources are mixed unprojected.
        value_init_noise: initial off-diagonal entries of `V`: "constant" 1e-6, or "random" N(0, 1e-6^2) as in the
            paper.
        temperature: whether `tau` falls from 50 to 1, by 0.05 per forward pass in training; otherwise it is 1.
        score_scale: factor on the scores.
    """

    tau: Tensor | None

    def __init__(
        self,
        width: int,
        *,
        dropout: float = 0.1,
        value: bool = True,
        value_init_noise: Literal["constant", "random"] = "constant",
        temperature: bool = False,
        score_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.value_init_noise = value_init_noise
        self.score_scale = score_scale
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False) if value else None
        # Not a parameter, but a resumed run needs its value.
        self.register_buffer("tau", torch.tensor(50.0) if temperature else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from the global random state."""
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, 0.0, 0.02)
            nn.init.zeros_(linear.bias)
        if self.value is not None:
            weight = self.value.weight
            with torch.no_grad():
                if self.value_init_noise == "random":
                    weight.normal_(0.0, 1e-6)
                else:
                    weight.fill_(1e-6)
                weight.fill_diagonal_(1.0)

    def forward(self, query: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """`u` `[b, n, d]` and the sources' outputs `[b, n, S, d]` give `c` `[b, n, d]` and attention `[b, n, S]`."""
        keys = self.key(outputs)
        scores = (keys @ self.query(query).unsqueeze(-1)).squeeze(-1) * self.score_scale
        scores = F.dropout(scores, self.dropout, self.training)
        if self.tau is not None:
            scores = scores / self.tau.clone()  # the update below must not change what the backward pass sees
            if self.training:
                self.tau.sub_(0.05).clamp_(min=1.0)
        probabilities = scores.softmax(-1)
        values = outputs if self.value is None else self.value(outputs)
        return (probabilities.unsqueeze(-2) @ values).squeeze(-2), probabilities

    def regularization(self, weight: float = 0.01) -> Tensor:
        r"""$\lambda \lVert I - V \rVert_F^2$, a scalar; 0 without a `V`."""
        if self.value is None:
            return self.query.weight.new_zeros(())
        value = self.value.weight.float()
        return weight * (torch.eye(value.shape[0], device=value.device) - value).square().sum()
