"""A small run in a process of its own: `python job.py FOLDER OUTPUT JSON`, also under torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny_tasks import losses, make_trainer, without_dropout
from transformers import TrainerCallback


class Killer(TrainerCallback):
    """Ends the process without a word in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    folder, output, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    kill, resume = settings.pop("kill", None), settings.pop("resume", False)
    dropout = settings.pop("dropout", True)
    callbacks = [Killer(kill)] if kill is not None else []
    trainer = make_trainer(folder, output, callbacks=callbacks, **settings)
    if not dropout:
        without_dropout(trainer)
    trainer.train(resume_from_checkpoint=True if resume else None)
    if trainer.is_world_process_zero():
        torch.save(
            {"losses": losses(trainer), "parameters": dict(trainer.model.named_parameters())}, output / "result.pt"
        )


main()
