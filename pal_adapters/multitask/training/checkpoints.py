"""Checkpoints of `MultiTaskTrainer`: complete or not there at all, restored in place, and uploaded as they are.

Every touch of `transformers.Trainer` that is not public, for 4.57 and 5:

| upstream symbol                         | what and why                                                             |
|-----------------------------------------|--------------------------------------------------------------------------|
| `Trainer._save`                         | overridden: the folder is that of `TaskHeads`                            |
| `Trainer._save_checkpoint`              | extended: an incomplete checkpoint is removed                            |
| `Trainer._save_optimizer_and_scheduler` | overridden for FSDP                                                      |
| `Trainer._load_optimizer_and_scheduler` | overridden for FSDP                                                      |
| `Trainer._load_from_checkpoint`         | overridden: values are copied in place                                   |
| `Trainer._load_best_model`              | overridden: values are copied in place                                   |
| `Trainer._push_from_checkpoint`         | extended: the host uploads `output_dir`, to which it copies files with   |
|                                         | names it knows, and ours have other names                                |
| `Trainer.push_in_progress`              | read: no file may change while the host uploads                          |

`test_upstream_of_checkpoints` in `tests/multitask/training/test_trainer_features.py` fails when one of them moves.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, get_last_checkpoint

from pal_adapters.errors import ConfigError, PalAdaptersError, StorageError
from pal_adapters.multitask.model.files import cause_of
from pal_adapters.multitask.model.parts import whole_parameters
from pal_adapters.multitask.model.saving import copy_saved
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.tasks.encoding import ConcatTasks, EncodedTask

from .described import described_run, logged_at
from .distributed import load_whole_state, whole_state


class _UploadError(PalAdaptersError):
    """A checkpoint was written but could not be uploaded."""


class Checkpoints(Trainer):
    """A Trainer whose checkpoints are those of `TaskHeads`."""

    scored: Mapping[str, Any] | None = None
    """What `evaluate` returned for the weights that the model has now; `None` if they were not evaluated."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains. `resume_from_checkpoint=True` resumes from the last complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(cast("str", self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ConfigError(
                    f"{self.args.output_dir} has no complete checkpoint to resume from: start without one."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model to a folder. With FSDP, all processes must call it."""
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
        described = described_run(
            cast("ConcatTasks", self.train_dataset),
            cast("Mapping[str, EncodedTask] | None", self.eval_dataset),
            self.scored,
        )
        model.save_pretrained(
            directory, processing_class=self.processing_class, tasks=described, checkpoint=self.is_in_train
        )
        torch.save(self.args, directory / "training_args.bin")

    def _save_checkpoint(self, model: Any, trial: Any, **kwargs: Any) -> None:
        directory = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        last = last_checkpoint(directory.parent)
        earlier = directory.with_name(f".{directory.name}.earlier")  # of another run in the same folder
        writes = self.args.should_save
        if writes and directory.is_dir():
            shutil.rmtree(earlier, ignore_errors=True)
            os.replace(directory, earlier)
        try:
            super()._save_checkpoint(model, trial, **kwargs)
        except _UploadError:  # the checkpoint is complete
            raise
        except BaseException as error:  # writers of files raise errors without a common base; also Ctrl-C
            if writes:
                shutil.rmtree(directory, ignore_errors=True)
                if earlier.is_dir():
                    os.replace(earlier, directory)
            if not isinstance(error, Exception):
                raise
            raise StorageError(
                f"{directory} cannot be written ({cause_of(error)}). The last complete checkpoint is "
                f"{last or 'none'}; make room and resume from it."
            ) from error
        finally:
            if writes:
                shutil.rmtree(earlier, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push = cast("Any", self.push_in_progress)
        running = push is not None and not push.is_done()
        uploads = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not running)
        try:
            if uploads and self.is_world_process_zero():
                copy_saved(Path(checkpoint_folder), Path(cast("str", self.args.output_dir)))
            super()._push_from_checkpoint(checkpoint_folder)
        except Exception as error:  # of the network, the Hub or the disk; the checkpoint itself is complete
            raise _UploadError(
                f"{checkpoint_folder} cannot be uploaded ({cause_of(error)}). It is complete: resume from it."
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
        self.scored = logged_at(self.state.log_history, self.state.best_global_step)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint in a folder, or `None`: where to resume from after a crash."""
    folder = Path(output_dir)
    if not folder.is_dir() or get_last_checkpoint(str(folder)) is None:
        return None
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # it is written last
        except (OSError, ValueError):
            continue
        return str(path)
    return None
