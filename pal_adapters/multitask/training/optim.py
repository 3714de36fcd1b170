"""AdamW without bias correction, and the schedule of the code of PALs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class UncorrectedAdamW(torch.optim.Optimizer):
    r"""AdamW as BERT was trained with: the moments are used as they are, so the first steps are large.

    $$m \leftarrow \beta_1 m + (1-\beta_1) g,\quad v \leftarrow \beta_2 v + (1-\beta_2) g^2,\quad
    w \leftarrow w - \eta \left(\frac{m}{\sqrt{v} + \epsilon} + \lambda w\right)$$

    A parameter without a gradient, such as one of a task that is absent from a step, stays as it is.

    Args:
        params: Parameters, or groups of them.
        lr: `η`.
        betas: `β_1` and `β_2`.
        eps: `ε`.
        weight_decay: `λ`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                mean: Tensor = state["exp_avg"]
                square: Tensor = state["exp_avg_sq"]
                mean.lerp_(parameter.grad, 1 - first)
                square.mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                update = mean / (square.sqrt() + group["eps"])
                parameter.add_(update + group["weight_decay"] * parameter, alpha=-group["lr"])
        return loss


def pals_schedule(step: int, *, warmup_steps: int, steps: int) -> float:
    """Factor on the learning rate: up to 1 in the warm-up, then `1 - step / steps`, which begins below 1."""
    return step / max(1, warmup_steps) if step < warmup_steps else max(0.0, 1.0 - step / steps)
