"""Checkpoints of `MultiTaskTrainer`: written whole or not at all, restored in place, and uploaded as they are.

Every touch of `transformers.Trainer` that is not public, for 4.57 and 5:

| upstream symbol                         | what and why                                                             |
|-----------------------------------------|--------------------------------------------------------------------------|
| `Trainer._save`                         | overridden: the folder is that of `TaskHeads`                            |
| `Trainer._save_checkpoint`              | extended: half a checkpoint is removed                                   |
| `Trainer._save_optimizer_and_scheduler` | overridden for FSDP                                                      |
| `Trainer._load_optimizer_and_scheduler` | the same                                                                 |
| `Trainer._load_from_checkpoint`         | overridden: values are copied in place                                   |
| `Trainer._load_best_model`              | the same                                                                 |
| `Trainer._push_from_checkpoint`         | extended: the host uploads `output_dir`, to which it copies files of     |
|                                         | names that it knows, none of them ours                                   |
| `Trainer.push_in_progress`              | read: says whether the host uploads now, so that no file changes under it |

`test_upstream_of_checkpoints` in `tests/multitask/training/test_trainer_features.py` fails when one of them moves.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, get_last_checkpoint

from pal_adapters.errors import ConfigError, PalAdaptersError
from pal_adapters.multitask.model.saved import copy_saved
from pal_adapters.multitask.model.storage import StorageError
from pal_adapters.multitask.model.task_heads import TaskHeads

from .distributed import load_whole_state, whole_parameters, whole_state


class Checkpoints(Trainer):
    """A Trainer whose checkpoints are those of `TaskHeads`."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains. `resume_from_checkpoint=True` takes the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(cast("str", self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ConfigError(f"{self.args.output_dir} has no whole checkpoint to resume from: start without one.")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model to a folder. With FSDP all processes have to call it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        with whole_parameters(self.accelerator.unwrap_model(self.model)):
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or cast("str", self.args.output_dir))
        if not self.args.should_save:
            return
        model = cast("TaskHeads", self.accelerator.unwrap_model(self.model))
        model.save_pretrained(directory, checkpoint=self.is_in_train)
        cast("Any", self.processing_class).save_pretrained(directory)
        torch.save(self.args, directory / "training_args.bin")

    def _save_checkpoint(self, model: Any, trial: Any, **kwargs: Any) -> None:
        directory = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(directory, ignore_errors=True)  # half a checkpoint is worse than none
            last = last_checkpoint(str(directory.parent))
            raise StorageError(
                f"{directory} cannot be written ({' '.join(str(error).split())[:200]}). The last whole checkpoint is "
                f"{last or 'none'}; make room and resume from it."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push = cast("Any", self.push_in_progress)
        running = push is not None and not push.is_done()
        uploads = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not running)
        try:
            if uploads and self.is_world_process_zero():
                copy_saved(Path(checkpoint_folder), Path(cast("str", self.args.output_dir)))
            super()._push_from_checkpoint(checkpoint_folder)
        except (OSError, RuntimeError) as error:  # otherwise taken for one of the checkpoint, which is whole
            raise PalAdaptersError(
                f"{checkpoint_folder} cannot be uploaded ({' '.join(str(error).split())[:200]}). It is whole: resume "
                "from it."
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(cast("torch.optim.Optimizer", self.optimizer))
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(cast("Any", self.lr_scheduler).state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            folder = Path(checkpoint)
            state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            load_whole_state(cast("torch.optim.Optimizer", self.optimizer), state)
            cast("Any", self.lr_scheduler).load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        cast("TaskHeads", self.accelerator.unwrap_model(self.model)).restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = cast("str", self.state.best_model_checkpoint)
        cast("TaskHeads", self.accelerator.unwrap_model(self.model)).restore(best)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a folder that was written to its end, or `None`: what to resume from after a crash."""
    folder = Path(output_dir)
    if not folder.is_dir() or get_last_checkpoint(str(folder)) is None:
        return None
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # is written last
        except (OSError, ValueError):
            continue
        return str(path)
    return None
