"""Code that only reproduces faults in the papers' released code. Nothing else belongs here.

| option | the fault |
|---|---|
| `legacy_ln_init` of the modules on top | scale and shift of layer norms start at `N(0, 0.02^2)` instead of 1 and 0 |
| `freeze_rule="code"` of CA-MTL | the FiLM of the attention term in frozen blocks is not trained |
| `top_block_init="scratch"` of CA-MTL | the last block loses its pretrained weights |
| `regularization_form="code"` of ScaLearn | the penalty of shared coefficients sums over channels and sources |

The options make the published runs reproducible; none is a default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.nn.unit import INIT_STD

CAMTL_PRESETS: dict[str, dict[str, Any]] = {
    "ca_mtl_base_code": {"bottleneck": "top", "freeze_rule": "code", "top_block_init": "scratch"},
    "ca_mtl_large_code": {"bottleneck": "stream", "freeze_rule": "code"},
}
"""The two networks of CA-MTL as released."""


def draw_layer_norm(norm: nn.LayerNorm, generator: torch.Generator | None) -> None:
    """Scale and shift from `N(0, 0.02^2)`."""
    with torch.no_grad():
        for parameter in (norm.weight, norm.bias):
            if parameter.device.type != "meta":
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, INIT_STD, generator=generator))


def freezes_attention_film(freeze_rule: str, block_is_frozen: bool) -> bool:
    """Whether the FiLM of a block's attention term stays frozen."""
    return freeze_rule == "code" and block_is_frozen


def draw_weights(parameters: Iterable[tuple[Tensor, nn.Module, str]], generator: torch.Generator | None) -> None:
    """Weights from `N(0, 0.02^2)`, biases of 0 and norm weights of 1; each with its module and its name there."""
    with torch.no_grad():
        for value, module, name in parameters:
            if value.dim() > 1 and value.device.type != "meta":
                value.copy_(torch.empty(value.shape).normal_(0.0, INIT_STD, generator=generator))
            elif value.dim() == 1:
                value.fill_(1.0 if name == "weight" and "norm" in type(module).__name__.lower() else 0.0)


def shared_scalearn_penalty(omega: Tensor) -> Tensor:
    r"""$\sum_s (1 - \sum_i \omega_{s,i})^2$ of `[S, d]`, without the mean over channels and the division by `S`."""
    return (1 - omega.sum(1)).square().sum()
