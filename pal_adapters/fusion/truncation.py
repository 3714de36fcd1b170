"""Approximation of a bottleneck by one with fewer units, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pal_adapters.nn.bottleneck import Bottleneck

_SAMPLES = 4096


def cut_to_width(source: Bottleneck, moments: Tensor, width: int) -> tuple[Bottleneck, float]:
    r"""Keep the `width` most important units of a bottleneck.

    With hidden values $h$ of covariance $C$, the centred output is $W_u (h - \bar h)$. Two selections of units
    are compared and the better one is kept: the units that span the leading right singular vectors of
    $W_u C^{1/2}$ (by column pivoting), and backward elimination, which repeatedly removes the unit whose loss adds the
    least error. $W_u$ and the bias are then refitted by least squares.

    Args:
        source: the wide bottleneck, width `R`.
        moments: `[R + 1, R + 1]`, the mean of `[h, 1]^T [h, 1]` over tokens, or a multiple of it.
        width: `k <= R`.

    Returns:
        The bottleneck, and the root mean square of its error relative to that of the output.
    """
    moments = moments.to(source.up.device).double()
    moments = moments / moments[-1, -1]
    up, bias = source.up.double(), source.up_bias.double()
    mean = moments[:-1, -1]
    covariance = moments[:-1, :-1] - mean[:, None] * mean[None, :]
    choices = (_spanning(up, covariance, width), _remaining(up, covariance, width))
    fits = [_fit(up, covariance, chosen) for chosen in choices]
    (fitted, left), chosen = min(zip(fits, choices, strict=True), key=lambda pair: pair[0][1])
    fitted_bias = bias + up @ mean - fitted @ mean[chosen]
    energy = (torch.trace(up @ covariance @ up.t()) + (up @ mean + bias).square().sum()).item()
    cut = Bottleneck(source.down[chosen], source.down_bias[chosen], fitted.to(source.up), fitted_bias.to(source.up))
    return cut, (left / energy) ** 0.5 if energy > 0 else 0.0


def _fit(up: Tensor, covariance: Tensor, chosen: Tensor) -> tuple[Tensor, float]:
    """The least-squares up-projection from the chosen units, and the mean square error that remains."""
    inner = covariance[chosen][:, chosen]
    fitted = up @ covariance[:, chosen] @ torch.linalg.pinv(inner, hermitian=True, rtol=1e-10)
    left = torch.trace(up @ covariance @ up.t() - fitted @ covariance[chosen] @ up.t())
    return fitted, left.clamp(min=0).item()


def _spanning(up: Tensor, covariance: Tensor, width: int) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    _, _, right = torch.linalg.svd(up @ root, full_matrices=False)
    return _pivots(right[:width] @ root, width)


def _remaining(up: Tensor, covariance: Tensor, width: int) -> Tensor:
    """The units that are left by backward elimination: removing unit $j$, with the others refitted, adds an error of
    $|u_j|^2 / (C^{-1})_{jj}$.
    """
    count = covariance.shape[0]
    floor = 1e-9 * covariance.diagonal().mean() + 1e-30  # units may be copies of each other, or never active
    inverse = torch.linalg.inv(covariance + floor * torch.eye(count).to(covariance))
    fitted, left = up.clone(), torch.ones(count, dtype=torch.bool, device=up.device)
    for _ in range(count - width):
        costs = fitted.square().sum(0) / inverse.diagonal()
        unit = int(costs.masked_fill(~left, float("inf")).argmin())
        left[unit] = False
        column, pivot = inverse[:, unit].clone(), inverse[unit, unit].clone()
        fitted -= fitted[:, unit : unit + 1] * (column / pivot)
        inverse -= torch.outer(column, column) / pivot
        inverse[unit, unit] = 1.0  # its score no longer matters: it is removed
    return left.nonzero().flatten()


def _pivots(columns: Tensor, count: int) -> Tensor:
    """Indices of `count` columns that span the largest volume, by Gram-Schmidt with pivoting."""
    rest = columns.clone()
    chosen: list[int] = []
    for _ in range(count):
        norms = rest.square().sum(0)
        norms[chosen] = -1.0
        best = int(norms.argmax())
        chosen.append(best)
        length = rest[:, best].norm()
        if length > 0:
            direction = rest[:, best] / length
            rest = rest - direction[:, None] * (direction @ rest)[None, :]
    return torch.tensor(sorted(chosen), device=columns.device)


def moments(hidden: Tensor) -> Tensor:
    """The sum of `[h, 1]^T [h, 1]` over tokens, `[R + 1, R + 1]`, for `h` `[t, R]`."""
    extended = torch.cat([hidden.double(), torch.ones_like(hidden[:, :1], dtype=torch.float64)], 1)
    return extended.t() @ extended


def noise(width: int, like: Tensor) -> Tensor:
    """Fixed N(0, 1) samples `[t, d]` that replace a bottleneck's inputs if there is no data."""
    return torch.randn(_SAMPLES, width, generator=torch.Generator().manual_seed(0)).to(like)
