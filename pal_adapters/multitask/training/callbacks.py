"""The callbacks of `MultiTaskTrainer`: sampler epochs, logging at checkpoints, gradient clipping, progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.sampling.strategies import MultiTaskBatchSampler


class Steps(TrainerCallback):
    """Keeps the sampler in step with the epochs of the run, logs at checkpoints, and clips each tensor's gradient.

    Args:
        sampler: Returns the sampler of the run.
    """

    def __init__(self, sampler: Callable[[], MultiTaskBatchSampler]) -> None:
        self.sampler = sampler

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        by_steps = getattr(args.eval_strategy, "value", args.eval_strategy) == "steps"
        if not args.load_best_model_at_end or not by_steps or args.eval_on_start:
            return
        first = state.eval_steps * max(1, math.ceil(args.eval_delay / state.eval_steps))
        if first > state.max_steps:
            raise ConfigError(
                f"load_best_model_at_end=True has no effect: with eval_steps={args.eval_steps} and "
                f"eval_delay={args.eval_delay} the first evaluation is in step {first}, but the run has "
                f"{state.max_steps} steps: lower them."
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The loader may be wrapped so deeply that its `set_epoch` does not reach the sampler.
        sampler = self.sampler()
        sampler.set_epoch(state.global_step // sampler.steps_per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        # Checkpoints do not store the running loss sums, so they must be logged at every checkpoint.
        if args.save_strategy == "steps" and state.save_steps and state.global_step % state.save_steps == 0:
            control.should_log = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if args.save_strategy == "epoch":
            control.should_log = True
        return control

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_tensor_grad_norm is not None:
            for parameter in kwargs["model"].parameters():
                if parameter.grad is not None:
                    torch.nn.utils.clip_grad_norm_(parameter, args.max_tensor_grad_norm)


class Progress(ProgressCallback):
    """The host's progress bar, followed by the last loss of each task."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        bar: Any = self.training_bar
        if state.is_world_process_zero and bar is not None and logs:
            losses = {name[5:]: f"{value:.3f}" for name, value in logs.items() if name.startswith("loss_")}
            if losses:
                bar.set_postfix(losses, refresh=False)
