"""Norms whose weight depends on the task. Plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .film import Condition, FiLM


class ConditionalNorm(nn.Module):
    r"""What a condition adds to the output of one of the host's layer norms or RMS norms.

    $$w' = (1 + \gamma(z')) \odot w + \beta(z'), \qquad y' = \hat x \odot w' + b
    = y + \hat x \odot (\gamma(z') \odot w + \beta(z'))$$

    with the standardised input `x_hat` and the norm's own output `y = x_hat * w + b`, so that `gamma = beta = 0` is
    the host's norm, bit for bit, in any precision. With `modulate_bias` the shift is modulated in the same way, as in
    the paper.

    Source: Pilault et al., ICLR 2021; the released code only modulates the weight.

    Args:
        size: `d`.
        modulate_bias: whether to modulate the shift too; no effect on norms without one.
    """

    def __init__(self, size: int, *, modulate_bias: bool = False) -> None:
        super().__init__()
        self.film = FiLM(size, size)
        self.bias_film = FiLM(size, size) if modulate_bias else None

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """Initialise FiLM; with `identity` the result is the host's norm."""
        self.film.reset_parameters(identity=identity, generator=generator)
        if self.bias_film is not None:
            self.bias_film.reset_parameters(identity=identity, generator=generator)

    def forward(self, y: Tensor, x_hat: Tensor, weight: Tensor, bias: Tensor | None, condition: Condition) -> Tensor:
        """The modulated output, in the dtype of `y`.

        Args:
            y: `[b, n, d]`, the norm's output.
            x_hat: `[b, n, d]`, its standardised input.
            weight: `[d]`, its weight.
            bias: `[d]`, its shift, or None.
            condition: the condition of the batch.
        """
        value = y + x_hat * _change(self.film, weight, condition)
        if bias is not None and self.bias_film is not None:
            value = value + _change(self.bias_film, bias, condition)
        return value.to(y.dtype)


class ConditionalLayerNorm(ConditionalNorm):
    """A conditional layer norm with its own weight and shift, which start at 1 and 0."""

    def __init__(self, size: int, *, modulate_bias: bool = False) -> None:
        super().__init__(size, modulate_bias=modulate_bias)
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(identity=identity, generator=generator)
        with torch.no_grad():
            self.weight.fill_(1.0)
            self.bias.zero_()

    def norm(self, x: Tensor, eps: float, condition: Condition) -> Tensor:
        """The conditional layer norm of `x` `[b, n, d]`, in its dtype."""
        x_hat = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
        weight, bias = self.weight.to(x_hat.dtype), self.bias.to(x_hat.dtype)
        return self(torch.addcmul(bias, x_hat, weight), x_hat, weight, bias, condition).to(x.dtype)


def _change(film: FiLM, values: Tensor, condition: Condition) -> Tensor:
    """`gamma values + beta` for each example, `[b, 1, d]` (`[1, 1, d]` with one condition)."""
    gamma, beta = film.coefficients(condition.table)
    return condition.rows(torch.addcmul(beta, values.to(beta.dtype), gamma)).unsqueeze(1)
