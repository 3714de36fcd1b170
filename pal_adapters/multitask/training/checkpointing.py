"""The part of the trainer that writes checkpoints and goes on from them; `checkpoints.py` says what it overrides."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from pal_adapters.multitask.model.parts import whole_parameters
from pal_adapters.multitask.model.saving import copy_saved
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.tasks.encoding import ConcatTasks, EncodedTask

from .arguments import MultiTaskTrainingArguments
from .checkpoints import complete_or_absent, uploading
from .described import described_run, logged_at
from .distributed import load_whole_states, save_whole_states
from .resuming import check_files, check_heads, check_sampling, read_state, reading_states, write_sampling


class CheckpointingTrainer(Trainer):
    """A `transformers.Trainer` whose checkpoints are folders of `TaskHeads`, restored in place."""

    args: MultiTaskTrainingArguments
    scored: Mapping[str, Any] | None = None
    """What `evaluate` returned for the current weights of the model; `None` if they were not evaluated."""

    def _sampling(self, batch_size: int | None = None) -> dict[str, Any]:
        """What the batches of the run depend on, see `resuming.sampling_of`.

        Args:
            batch_size: Examples in a batch; None for those of the running epoch.
        """
        raise NotImplementedError

    def _task_heads(self) -> TaskHeads:
        """The model without the wrappers of a distributed run."""
        return cast("TaskHeads", self.accelerator.unwrap_model(self.model))

    def _check_checkpoint(self, checkpoint: str | PathLike[str]) -> None:
        """Raises an error unless this run can go on from a checkpoint; nothing has changed yet."""
        folder, args = Path(checkpoint), self.args
        check_heads(folder, self._task_heads())
        state = read_state(folder)
        exactly = not args.ignore_data_skip
        if exactly:
            # After running out of memory, the host continues with the smaller batches of the checkpoint.
            found = state.get("train_batch_size") if args.auto_find_batch_size else None
            check_sampling(folder, self._sampling(found or args.train_batch_size))
        if not self.is_deepspeed_enabled:  # it has files of its own
            name = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
            check_files(folder, generators=name, exactly=exactly)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model to a folder. With FSDP, all processes must call it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        with whole_parameters(self._task_heads()):
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or cast("str", self.args.output_dir))
        evaluated = cast("Mapping[str, EncodedTask] | None", self.eval_dataset)
        described = described_run(cast("ConcatTasks", self.train_dataset), evaluated, self.scored)
        self._task_heads().save_pretrained(
            directory, processing_class=self.processing_class, tasks=described, checkpoint=self.is_in_train
        )
        torch.save(self.args, directory / "training_args.bin")
        if self.is_in_train:
            write_sampling(self._sampling(), directory)

    def _save_checkpoint(self, model: Any, trial: Any, **kwargs: Any) -> None:
        directory = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) == "best":
            # transformers 4.57 does not note it, and `load_best_model_at_end` would have no effect.
            self.state.best_global_step = self.state.global_step
            self.state.best_model_checkpoint = str(directory)
        with complete_or_absent(directory, self.args.should_save):
            super()._save_checkpoint(model, trial, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push = cast("Any", self.push_in_progress)
        running = push is not None and not push.is_done()
        uploads = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not running)
        with uploading(checkpoint_folder):
            if uploads and self.is_world_process_zero():
                copy_saved(Path(checkpoint_folder), Path(cast("str", self.args.output_dir)))
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = cast("torch.optim.Optimizer", self.optimizer)
        save_whole_states(Path(output_dir), optimizer, self.lr_scheduler, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading_states(checkpoint, "optimizer.pt and scheduler.pt"):
            if not self.is_fsdp_enabled:
                super()._load_optimizer_and_scheduler(checkpoint)
            elif checkpoint is not None:
                load_whole_states(Path(checkpoint), cast("torch.optim.Optimizer", self.optimizer), self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading_states(checkpoint, "rng_state"):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._task_heads().restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._task_heads().restore(cast("str", self.state.best_model_checkpoint))
        self.scored = logged_at(self.state.log_history, self.state.best_global_step)
