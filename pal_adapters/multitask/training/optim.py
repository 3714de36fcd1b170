"""AdamW without bias correction, the schedule of the PALs code, and the learning rate of attention in task modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.model.task_heads import TaskHeads

from .arguments import MultiTaskTrainingArguments


class UncorrectedAdamW(torch.optim.Optimizer):
    r"""AdamW as used to train BERT: the moments are not corrected for their bias, so the first steps are large.

    $$m \leftarrow \beta_1 m + (1-\beta_1) g,\quad v \leftarrow \beta_2 v + (1-\beta_2) g^2,\quad
    w \leftarrow w - \eta \left(\frac{m}{\sqrt{v} + \epsilon} + \lambda w\right)$$

    A parameter without a gradient, such as one of a task that is absent from a step, does not change.

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
        """Performs one optimizer step."""
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


def uncorrected(args: MultiTaskTrainingArguments) -> tuple[type[UncorrectedAdamW], dict[str, Any]]:
    """`UncorrectedAdamW` and its options, in the form that `transformers.Trainer` expects."""
    betas = (args.adam_beta1, args.adam_beta2)
    return UncorrectedAdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def pals_schedule(step: int, *, warmup_steps: int, steps: int) -> float:
    """Learning-rate factor: rises to 1 during warm-up, then `1 - step / steps`, which starts below 1."""
    return step / max(1, warmup_steps) if step < warmup_steps else max(0.0, 1.0 - step / steps)


def give_attention_its_rate(optimizer: torch.optim.Optimizer, model: TaskHeads, rate: float) -> None:
    """Moves the queries, keys and values of task modules to parameter groups with a learning rate of their own.

    Raises:
        ConfigError: If no task module has attention.
    """
    added = model.added_parameters()
    fast = {id(p) for n, p in added.items() if {"query", "key", "value"} & set(n.split("."))}
    if not fast:
        raise ConfigError("attention_learning_rate has no effect: no task module has attention.")
    for group in list(optimizer.param_groups):
        chosen = [p for p in group["params"] if id(p) in fast]
        group["params"] = [p for p in group["params"] if id(p) not in fast]
        if chosen:
            optimizer.add_param_group({**group, "params": chosen, "lr": rate})
