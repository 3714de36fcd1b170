"""Norms whose weight depends on the task. Plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .film import Condition, FiLM


class ConditionalNorm(nn.Module):
    r"""The modulation of a layer norm (or RMS norm) by a condition; the norm's own weights come from the host.

    $$w' = (1 + \gamma(z')) \odot w + \beta(z'), \qquad y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot w' + b$$

    RMS norm: without mean and shift. With `modulate_bias` the shift is modulated in the same way, as in the paper.

    Source: Pilault et al., ICLR 2021; the released code modulates the weight alone.

    Args:
        size: `d`.
        modulate_bias: whether the shift is modulated too; it has no effect on an RMS norm.
    """

    def __init__(self, size: int, *, modulate_bias: bool = False) -> None:
        super().__init__()
        self.film = FiLM(size, size)
        self.bias_film = FiLM(size, size) if modulate_bias else None

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """FiLM as everywhere; with `identity` the host's norm."""
        self.film.reset_parameters(identity=identity, generator=generator)
        if self.bias_film is not None:
            self.bias_film.reset_parameters(identity=identity, generator=generator)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, condition: Condition, *, rms: bool = False
    ) -> Tensor:
        """The norm of `x` `[b, n, d]` with the modulated `weight` and `bias` `[d]`, in the dtype of `x`."""
        scale = _modulated(self.film, weight, condition)
        shift = bias if bias is None or self.bias_film is None else _modulated(self.bias_film, bias, condition)
        return rms_norm(x, scale, eps) if rms else layer_norm(x, scale, shift, eps)


class ConditionalLayerNorm(ConditionalNorm):
    """A conditional layer norm with a weight and a shift of its own, which start at 1 and 0."""

    def __init__(self, size: int, *, modulate_bias: bool = False) -> None:
        super().__init__(size, modulate_bias=modulate_bias)
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(identity=identity, generator=generator)
        with torch.no_grad():
            self.weight.fill_(1.0)
            self.bias.zero_()


def _modulated(film: FiLM, values: Tensor, condition: Condition) -> Tensor:
    """`(1 + gamma) values + beta` for each row, `[b, 1, d]` (`[1, 1, d]` with one condition)."""
    gamma, beta = film.coefficients(condition.table)
    return condition.rows(torch.addcmul(beta, values.to(beta.dtype), 1 + gamma)).unsqueeze(1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of `x` `[b, n, d]` with a weight `[b, 1, d]` and a bias `[d]` or `[b, 1, d]`, or None."""
    size = (x.shape[-1],)
    if weight.shape[0] == 1 and (bias is None or bias.numel() == size[0]):
        own = weight.flatten().to(x.dtype)
        return F.layer_norm(x, size, own, None if bias is None else bias.flatten().to(x.dtype), eps)
    y = F.layer_norm(x, size, eps=eps).to(weight.dtype)
    return (y * weight if bias is None else torch.addcmul(bias.to(weight.dtype), y, weight)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of `x` `[b, n, d]` with a weight `[b, 1, d]`, computed in float32 as Llama does."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * y.to(x.dtype)).to(x.dtype)
