"""Recreates a `Task` from its description, which a saved folder keeps; see `Task.describe`."""

from __future__ import annotations

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.model.heads import HeadConfig
from pal_adapters.multitask.model.task_description import COLUMNS, CUSTOM, TaskDescription

from .glue import TASKS
from .task import Task


def described_task(description: TaskDescription, head: HeadConfig) -> Task:
    """The task of a description, without data.

    Args:
        description: The description.
        head: Its head.

    Raises:
        ConfigError: If the head does not fit, or the template is a function, which is not saved.
    """
    description.check_head(head)
    if description.template != COLUMNS and TASKS.get(description.template, {}).get("render") is None:
        unknown = "a function" if description.template == CUSTOM else f"{description.template!r}, which is unknown"
        raise ConfigError(
            f"task {description.name!r}: its text is made by {unknown}: pass tasks=[Task({description.name!r}, {{}}, "
            "..., render=...)]."
        )
    return Task(
        description.name,
        {},
        kind=description.kind,
        text_columns=description.text_columns,
        label_column=None,
        num_labels=head.num_labels,
        label_names=description.label_names if head.label_names else (),
        num_choices=head.num_choices,
        render=TASKS.get(description.template, {}).get("render"),
    )
