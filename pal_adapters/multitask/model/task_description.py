"""What is known about a task besides its weights: how its examples are encoded and what its outputs are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

from pal_adapters.checks import require_bool, require_int, require_one_of
from pal_adapters.errors import ConfigError

from .heads import KINDS, HeadConfig, Kind
from .names import require_task_name

COLUMNS, CUSTOM = "columns", "custom"
LONGEST_INPUT = 1_000_000
"""In tokens; more than any model reads."""


@dataclass(frozen=True)
class TaskDescription:
    """A task as its users see it. It is saved with the model and is plain data.

    Args:
        name: Name of the task.
        kind: See `HeadConfig`.
        text_columns: The columns that an example needs, see `Task`.
        label_names: Names of the classes, numbers or choices.
        max_length: Tokens of an input; longer ones are truncated or, for tagging and questions, cut into windows.
        template: How the columns become text: `"columns"` for the columns as they are, the full name of a benchmark's
            task such as `"super_glue/copa"`, or `"custom"` for a function that has to be passed again.
        unanswerable: Whether a question may have no answer.
        thresholds: For `multi_label`, the smallest probability of each label that is predicted; 0.5 by default.
        metric: Name of its first metric.
        score: Score of the saved weights in that metric.
    """

    name: str
    kind: Kind
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    max_length: int = 128
    template: str = COLUMNS
    unanswerable: bool = True
    thresholds: tuple[float, ...] = ()
    metric: str | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        require_task_name("name", self.name)
        where = f"task {self.name!r}: "
        require_one_of(f"{where}kind", self.kind, KINDS)
        for name in ("text_columns", "label_names"):
            object.__setattr__(self, name, _texts(where + name, getattr(self, name)))
        if not self.text_columns:
            raise ConfigError(f"{where}text_columns is empty: name the columns of the text.")
        require_int(f"{where}max_length", self.max_length, minimum=1, maximum=LONGEST_INPUT)
        require_bool(f"{where}unanswerable", self.unanswerable)
        if not isinstance(self.template, str) or not self.template:
            raise ConfigError(f"{where}template={self.template!r:.40} is not allowed: use a text.")
        object.__setattr__(self, "thresholds", self._checked_thresholds(where))
        if self.metric is not None and not isinstance(self.metric, str):
            raise ConfigError(f"{where}metric={self.metric!r:.40} is not allowed: use a text.")
        if self.score is not None and not _is_number(self.score):
            raise ConfigError(f"{where}score={self.score!r:.40} is not allowed: use a finite number.")

    def _checked_thresholds(self, where: str) -> tuple[float, ...]:
        given = self.thresholds
        good = isinstance(given, (tuple, list)) and all(_is_number(value) and 0 <= value <= 1 for value in given)
        if not good:
            raise ConfigError(f"{where}thresholds={given!r:.60} is not allowed: use numbers from 0 to 1.")
        if given and (self.kind != "multi_label" or len(given) != len(self.label_names)):
            raise ConfigError(f"{where}thresholds is not allowed: use it for multi_label, with one for each label.")
        return tuple(map(float, given))

    def check_head(self, head: HeadConfig) -> None:
        """Raises `ConfigError` unless the task has the kind and the number of labels of its head."""
        if head.kind != self.kind:
            raise ConfigError(f"task {self.name!r} is {self.kind}, but its head is {head.kind}.")
        wanted = head.num_choices if head.kind == "multiple_choice" else head.num_labels or 0
        if len(self.label_names) != wanted:
            raise ConfigError(
                f"task {self.name!r} has {len(self.label_names)} label names, but its head has {wanted} outputs."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON."""
        found = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @classmethod
    def from_dict(cls, stored: object) -> TaskDescription:
        """Reads and checks what `to_dict` returned.

        Raises:
            ConfigError: If a field is missing, unknown or not allowed.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(stored, Mapping) or set(stored) != set(known):
            raise ConfigError(f"{stored!r:.60} is not a task: it needs {', '.join(known)}.")
        return cls(**stored)


@runtime_checkable
class Describable(Protocol):
    """Anything that can describe how its examples are encoded, such as a `Task`."""

    def describe(self, *, max_length: int) -> TaskDescription:
        """Its description."""
        ...


def default_length(tokenizer: Any) -> int:
    """The maximum length for a task whose description gives none: the tokenizer's, but at most 512 tokens."""
    return min(tokenizer.model_max_length, 512)


def output_names(head: HeadConfig) -> tuple[str, ...]:
    """Names of the outputs of a head: its labels', or `LABEL_0` and so on, as transformers calls them."""
    count = head.num_choices if head.kind == "multiple_choice" else head.num_labels or 0
    return head.label_names or tuple(f"LABEL_{number}" for number in range(count))


def _texts(argument: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{argument}={value!r:.60} is not allowed: use a list of texts.")
    if len(set(value)) < len(value):
        raise ConfigError(f"{argument}={value!r:.60} is not allowed: it has the same text twice.")
    return tuple(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
