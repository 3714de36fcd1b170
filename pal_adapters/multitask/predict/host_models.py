"""A model of PEFT or `adapters` with the host's own heads, each adapter trained alone for one task."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.multitask.model.heads import HeadConfig
from pal_adapters.multitask.model.routes import adapter_host, adapter_names
from pal_adapters.multitask.model.routing import cache_argument
from pal_adapters.multitask.model.setups import active_in_peft, in_pass, under_setup
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.multitask.tasks.task import Task


class HostEngine:
    """A model with the host's own heads. A batch has one task: the host picks the head for all of its examples.

    Args:
        model: A `PeftModel`, or a model of `adapters`.
        tasks: The tasks. Each uses the adapter of its name or, if there is only one, that one; in `adapters`, the same
            holds for the head on a model with flexible heads.

    Raises:
        ConfigError: For a task without an adapter, without a head, or with another number of labels than its head.
        UnsupportedError: For a model without a host.
    """

    def __init__(self, model: Any, tasks: Iterable[Task | TaskDescription]) -> None:
        self.host = adapter_host(model)
        if self.host is None:
            raise UnsupportedError(
                f"a {type(model).__name__} without adapters has no tasks: pass TaskHeads, a PeftModel or a model of "
                "adapters."
            )
        self.model = model
        self._heads = {task.name: _head_config(task) for task in tasks}
        known = adapter_names(model)
        self._adapters = {task: _pick("adapter", task, known) for task in self._heads}
        self._own: dict[str, str] = {}
        if self.host == "adapters":
            from adapters.heads import ModelWithFlexibleHeadsAdaptersMixin  # only here: PEFT does without `adapters`

            if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
                self._own = {task: _pick("head", task, tuple(model.heads)) for task in self._heads}
        for task, head in self._heads.items():
            self._check_outputs(task, head)

    @property
    def backbone(self) -> Any:
        """The model of the host."""
        return self.model

    def heads(self) -> Mapping[str, HeadConfig]:
        """The configuration of the head of each task."""
        return self._heads

    def described(self) -> Mapping[str, TaskDescription]:
        """The hosts save no descriptions."""
        return {}

    def group(self, task: str) -> Hashable:
        """Each task has batches of its own."""
        return ("alone", task)

    def cache_argument(self, task: str) -> str | None:
        """The name of the argument for a key/value cache; `None` if a pass cannot continue from one."""
        return cache_argument(self.model, self._adapters[task])

    def logits(self, tasks: Sequence[str], inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The logits of a batch of one task."""
        (task,) = set(tasks)
        head, adapter = self._heads[task], self._adapters[task]
        if head.kind == "multiple_choice":
            inputs = {name: value.unflatten(0, (-1, head.num_choices)) for name, value in inputs.items()}
        more = {"head": self._own[task]} if task in self._own else {}
        under = under_setup(adapter) if self.host == "adapters" else partial(active_in_peft, self.model, adapter)
        output = in_pass(self.model, under, lambda: self.model(**inputs, **more, return_dict=True))
        return {task: _plain(output, head, inputs.get("attention_mask"))}

    def _check_outputs(self, task: str, head: HeadConfig) -> None:
        if head.num_labels is None:
            return
        if task in self._own:
            there = self.model.heads[self._own[task]].config.get("num_labels")
        else:
            there = getattr(self.model.config, "num_labels", None)
        if there is not None and there != head.num_labels:
            raise ConfigError(f"task {task!r} has {head.num_labels} labels, but its head has {there} outputs.")


def _head_config(task: Task | TaskDescription) -> HeadConfig:
    if isinstance(task, Task):
        return task.head_config()
    if not isinstance(task, TaskDescription):
        raise ConfigError(f"tasks has a {type(task).__name__}: pass Task or TaskDescription objects.")
    count = len(task.label_names) or None
    if task.kind == "multiple_choice":
        return HeadConfig(task.kind, num_choices=count or 1)
    return HeadConfig(task.kind, count)


def _pick(what: str, task: str, known: Sequence[str]) -> str:
    """The adapter or head of a task: the one of its name, or the only one."""
    if task in known or len(known) == 1:
        return task if task in known else known[0]
    there = ", ".join(map(repr, known)) or "none"
    raise ConfigError(f"task {task!r} has no {what} of its name, the model has: {there}. Rename the task.")


def _plain(output: Any, head: HeadConfig, mask: Tensor | None) -> Tensor:
    """The logits as `TaskHeads` returns them."""
    if head.kind == "span_qa":
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
        return logits if mask is None else logits.masked_fill((mask == 0)[..., None], torch.finfo(logits.dtype).min)
    return output.logits.squeeze(-1) if head.kind == "regression" and head.num_labels == 1 else output.logits
