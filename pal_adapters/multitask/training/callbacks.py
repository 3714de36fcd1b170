"""What `MultiTaskTrainer` adds to a run by callbacks: epochs, logs, bounds of gradients, the progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

if TYPE_CHECKING:
    from .trainer import MultiTaskTrainer


class Steps(TrainerCallback):
    """Keeps the sampler at the epoch of the run, logs where a checkpoint is, and clips tensor by tensor."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The loader may be wrapped too deep for its `set_epoch` to arrive.
        sampler = self.trainer._sampler
        assert sampler is not None
        sampler.set_epoch(state.global_step // sampler.steps_per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        # The sums of the loss are not part of a checkpoint, so they end where it is.
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
    """The host's progress bar, with the last loss of each task behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        bar: Any = self.training_bar
        if state.is_world_process_zero and bar is not None and logs:
            losses = {name[5:]: f"{value:.3f}" for name, value in logs.items() if name.startswith("loss_")}
            if losses:
                bar.set_postfix(losses, refresh=False)
