"""A learned combination of sources as one plain adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..bottlenecks import Bottleneck
from .host import host_of


@dataclass(frozen=True)
class Folded:
    """What `fold` made.

    Attributes:
        name: the adapter.
        widths: its width at each place, such as `{"0.output_adapter": 384}`.
        errors: at each place that was truncated, the error of what the adapter adds, relative to its size (root mean
            squares over tokens and channels). Empty for an exact fold.
    """

    name: str
    widths: Mapping[str, int]
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest of `errors`, 0 for an exact fold."""
        return max(self.errors.values(), default=0.0)


def fold(model: Any, fusion: Any = None, *, name: str | None = None, **options: Any) -> Any:
    r"""Make one plain adapter of a fusion whose coefficients do not depend on the input.

    $\sum_s \omega_s \odot a_s$ of bottlenecks $a_s = W_{u,s} f(W_{d,s} x + b_{d,s}) + b_{u,s}$ is itself a bottleneck:
    its down-projection is that of all sources, one below the other, and the rows of its up-projection carry $\omega$.
    So the result is exact, its width is the sum of the sources' widths, and it needs neither the sources nor this
    package.

    Args:
        model: a model of `adapters`, or a `PeftModel`.
        fusion: `adapters`: the `Fuse` block, or the name of the fusion. PEFT: the name of the combination; None is the
            active one.
        name: of the new adapter. `adapters`: an ordinary bottleneck; save it with `save_adapter`. PEFT: an ordinary
            LoRA or Houlsby adapter; None keeps the name of the combination.
        **options: for `adapters`:

            - `truncate`: the width to cut it to. The units that matter most are kept, found by a singular value
              decomposition of what the units contribute to the output, and the up-projection is fitted anew to give
              what all of them gave.
            - `data`: with `truncate`, batches (dicts of model inputs) whose tokens are weighed; without them, inputs
              are taken as N(0, 1).

            For PEFT, see `pal_adapters.fusion.peft_folding.fold`.

    Returns:
        `adapters`: a `Folded`, and the model has the new adapter. PEFT: the folded model.

    Raises:
        UnsupportedError: where no exact fold exists, with the reason: attention over the sources, sources that are no
            bottlenecks, or bottlenecks that differ in their non-linearity or placement, or have gates or norms behind.
        ConfigError: for a name that is taken, or options that have no effect.
        UnknownAdapterError: for a fusion that is not on the model.
    """
    if host_of(model) == "adapters":
        from .adapters_folding import fold_adapters

        return fold_adapters(model, fusion, name, **options)
    from . import peft_folding

    return peft_folding.fold(model, fusion, name=name, **options)


def cut_to_width(source: Bottleneck, moments: Tensor, width: int) -> tuple[Bottleneck, float]:
    r"""The bottleneck of the best `width` units, and its relative error.

    With hidden values $h$, the centred output is $W_u (h - \bar h)$, of covariance $W_u C W_u^T$. The right singular
    vectors of $W_u C^{1/2}$ say which directions of the units matter; the units that span the first `width` of them
    are chosen by column pivoting, and $W_u$ is fitted to them by least squares, which also gives the bias.

    Args:
        source: the wide bottleneck, width `R`.
        moments: `[R + 1, R + 1]`, the mean of `[h, 1]^T [h, 1]` over tokens.
        width: `k <= R`.

    Returns:
        The bottleneck, and the root mean square of its error over that of the output.
    """
    moments = moments.double()
    up, bias = source.up.double(), source.up_bias.double()
    mean = moments[:-1, -1]
    covariance = moments[:-1, :-1] - mean[:, None] * mean[None, :]
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    _, _, right = torch.linalg.svd(up @ root, full_matrices=False)
    chosen = _pivots(right[:width] @ root, width)
    inner = covariance[chosen][:, chosen]
    fitted = up @ covariance[:, chosen] @ torch.linalg.pinv(inner, hermitian=True, rtol=1e-10)
    fitted_bias = bias + up @ mean - fitted @ mean[chosen]
    energy = (torch.trace(up @ covariance @ up.t()) + (up @ mean + bias).square().sum()).item()
    left = torch.trace(up @ covariance @ up.t() - fitted @ covariance[chosen] @ up.t()).clamp(min=0).item()
    cut = Bottleneck(source.down[chosen], source.down_bias[chosen], fitted.to(source.up), fitted_bias.to(source.up))
    return cut, (left / energy) ** 0.5 if energy > 0 else 0.0


def _pivots(columns: Tensor, count: int) -> Tensor:
    """Indices of `count` columns that span the most, by Gram-Schmidt with pivoting."""
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
