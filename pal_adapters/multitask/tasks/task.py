"""A task: its data, what its head is, how rows become text, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from pal_adapters.checks import require_one_of
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.metrics.custom import Metric, flat_metrics, metric_name, own_metric_problem
from pal_adapters.multitask.metrics.scores import default_metrics, metric_problem
from pal_adapters.multitask.model.heads import KINDS, HeadConfig, Kind, Loss, Pooling

from .glue import Row, Segments, TaskSpec
from .labels import NAMED_KINDS, class_names, has_flags, has_unanswerable
from .names import require_task_name
from .reading import load_task

Splits = Mapping[str, datasets.Dataset]

_LABEL_COLUMNS = {"token_tagging": "tags", "span_qa": "answers", "language_modeling": None}
_TEXT_COLUMNS = {"token_tagging": ("tokens",), "span_qa": ("question", "context"), "language_modeling": ("text",)}


@dataclass
class Task:
    """One of the tasks that a model is trained on.

    | `kind` | text columns | label column |
    |---|---|---|
    | `single_label` | a text, or a pair | class number, or one of `label_names` |
    | `multi_label` | a text, or a pair | list of class numbers or `label_names`, or of 0 and 1 for every class |
    | `regression` | a text, or a pair | number |
    | `token_tagging` | list of words | class number of every word or one of `label_names`, -100 for none |
    | `span_qa` | question, context | `{"text": [...], "answer_start": [...]}` |
    | `multiple_choice` | a text, and each of the choices | number of the choice |
    | `language_modeling` | a text | none: the text itself |

    Args:
        name: Name, also of its head and, unless `adapter` says otherwise, of its adapter. Without `.` and `/`; not
            `average`, nor an attribute of `nn.ModuleDict` such as `type`.
        dataset: Splits by name: a `datasets.DatasetDict`, or a dict of `datasets.Dataset`.
        kind: What is predicted, see above.
        text_columns: Columns of the text. Tagging, questions and language models have default names.
        label_column: Column of the label.
        num_labels: Number of classes, or of numbers for a regression. Not needed with `label_names`.
        label_names: Names of the classes. By default those of the label column, if it is a `datasets.ClassLabel`.
        metrics: Names of metrics, or functions of predictions and references, or objects of `evaluate`; the first is
            the one that models are chosen by. By default those of the kind.
        loss: A loss of one's own, the mean over logits and labels of a batch.
        weight: Weight of its loss beside those of other tasks.
        adapter: See `TaskHeads.add`.
        head: Name of an earlier task whose head is used, instead of one of its own.
        pooling: See `HeadConfig`.
        dropout: See `HeadConfig`.
        label_range: Smallest and largest label of a regression.
        train_split: Name of the split to train on.
        validation_splits: Names of the splits to evaluate on. The first is the one that models are chosen by.
        group_columns: Columns that say which rows belong to one question, for `exact_match` of single labels.
        split_columns: Columns whose equal values must stay together if the training rows are cut in two.
        render: Turns a row into its encoder inputs, where the columns as they are will not do.
        expand: Turns a split into the rows to encode, where one row makes several.
        benchmark: Collection that the task belongs to, if it does, such as `"glue"`.

    Raises:
        ConfigError: For arguments that are not allowed or do not fit each other.

    Example:
        >>> rows = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]})
        >>> Task("mood", {"train": rows}, text_columns=("text",), num_labels=2).metrics
        ('accuracy',)
    """

    name: str
    dataset: Splits = field(repr=False)
    kind: Kind = "single_label"
    text_columns: tuple[str, ...] = ()
    label_column: str | None = "label"
    num_labels: int | None = None
    label_names: tuple[str, ...] = ()
    metrics: tuple[str | Metric, ...] = ()
    loss: Loss | None = None
    weight: float = 1.0
    adapter: Any = "auto"
    head: str | None = None
    pooling: Pooling = "mean"
    dropout: float = 0.1
    label_range: tuple[float, float] | None = None
    train_split: str = "train"
    validation_splits: tuple[str, ...] = ("validation",)
    group_columns: tuple[str, ...] = ()
    split_columns: tuple[str, ...] = ()
    render: Callable[[Row], list[Segments]] | None = field(default=None, repr=False)
    expand: Callable[[datasets.Dataset], datasets.Dataset] | None = field(default=None, repr=False)
    benchmark: str = ""

    def __post_init__(self) -> None:
        require_task_name("name", self.name)
        require_one_of("kind", self.kind, KINDS)
        for name in ("text_columns", "label_names", "metrics", "validation_splits", "group_columns", "split_columns"):
            value = getattr(self, name)
            single = isinstance(value, str) or callable(value) or hasattr(value, "compute")
            setattr(self, name, (value,) if single else tuple(value))
        if not self.text_columns:
            if self.kind not in _TEXT_COLUMNS:
                raise ConfigError(f"task {self.name!r}: text_columns is empty: name the columns of the text.")
            self.text_columns = _TEXT_COLUMNS[self.kind]
        if self.label_range is not None and self.kind != "regression":
            raise ConfigError(f"task {self.name!r}: label_range has no effect for kind={self.kind!r}: leave it out.")
        if not isinstance(self.dataset, Mapping):
            raise ConfigError(
                f"task {self.name!r}: dataset is a {type(self.dataset).__name__}: pass a dict of splits."
            )
        for split, rows in self.dataset.items():
            if isinstance(rows, datasets.IterableDataset):
                raise ConfigError(
                    f"task {self.name!r}: split {split!r} is an IterableDataset, whose rows cannot be drawn in any "
                    "order: load it without streaming=True, or pass datasets.Dataset.from_list(list(rows))."
                )
        if self.label_column == "label" and self.kind in _LABEL_COLUMNS:
            usual = _LABEL_COLUMNS[self.kind]
            columns = {column for rows in self.dataset.values() for column in getattr(rows, "column_names", ())}
            if usual is None or usual in columns or "label" not in columns:
                self.label_column = usual
        if self.kind in NAMED_KINDS and not self.label_names:
            names = class_names(self.dataset.get(self.train_split), self.label_column)
            self.label_names = names if self.num_labels in (None, len(names)) else ()
        try:
            config = self.head_config()
        except ConfigError as error:
            raise ConfigError(f"task {self.name!r}: {error}") from error
        self.num_labels = config.num_labels
        self.metrics = flat_metrics(self.metrics) or default_metrics(self.kind, self.num_labels)
        self._check_metrics()

    def _check_metrics(self) -> None:
        seen = set()
        for metric in self.metrics:
            name = metric_name(metric)
            if name in seen:
                raise ConfigError(f"task {self.name!r}: metrics has two called {name!r}: give each a name of its own.")
            seen.add(name)
            if isinstance(metric, str):
                problem = metric_problem(metric, self.kind, self.num_labels, bool(self.group_columns))
            else:
                problem = own_metric_problem(metric, self.kind, self.num_labels, self.label_names)
            if problem:
                raise ConfigError(f"task {self.name!r}: metric {name!r} {problem}.")

    @property
    def num_choices(self) -> int:
        """Encoder inputs of each row."""
        return len(self.text_columns) - 1 if self.kind == "multiple_choice" and self.render is None else self._choices

    _choices: int = field(default=1, repr=False)

    @cached_property
    def has_unanswerable(self) -> bool:
        """Whether some of its questions have no answer, so that none may be predicted; by its training rows."""
        return self.kind == "span_qa" and has_unanswerable(self)

    @cached_property
    def has_flags(self) -> bool | None:
        """Whether its sets of labels are written as 0 or 1 for each class, in all splits; `None` without any rows."""
        return has_flags(self) if self.kind == "multi_label" else False

    def head_config(self) -> HeadConfig:
        """What its head is."""
        return HeadConfig(
            self.kind,
            self.num_labels,
            num_choices=self.num_choices,
            pooling=self.pooling,
            dropout=self.dropout,
            label_names=self.label_names if self.kind not in ("multiple_choice", "span_qa") else (),
        )

    def segments(self, row: Row) -> list[Segments]:
        """Encoder inputs of a row: each a text, or a pair."""
        if self.render is not None:
            return self.render(row)
        first, *rest = (row[column] for column in self.text_columns)
        if self.kind == "multiple_choice":
            return [(first, choice) for choice in rest]
        return [(first, rest[0] if rest else None)]

    def validation(self) -> dict[str, datasets.Dataset]:
        """The splits to evaluate on that are there, under the name of the task, and for more than one of the split."""
        found = {}
        for number, split in enumerate(self.validation_splits):
            if split in self.dataset:
                suffix = split.removeprefix("validation").strip("_") or str(number)
                found[self.name if number == 0 else f"{self.name}_{suffix}"] = self.dataset[split]
        return found

    def with_data(self, dataset: Splits) -> Task:
        """The same task with other rows."""
        return replace(self, dataset=dataset)

    @classmethod
    def from_spec(cls, spec: TaskSpec, dataset: Splits, **changes: Any) -> Task:
        """A task from its description in the tables of GLUE and SuperGLUE."""
        kind: Kind = "regression" if spec.is_regression else "single_label"
        if spec.num_choices > 1:
            kind = "multiple_choice"
        given: dict[str, Any] = {
            "kind": kind,
            "text_columns": spec.text_columns,
            "label_column": spec.label_column,
            "num_labels": spec.num_labels if kind == "single_label" else None,
            "label_names": spec.label_names if kind != "multiple_choice" else (),
            "metrics": spec.metrics,
            "label_range": spec.label_range,
            "group_columns": spec.group_columns,
            "split_columns": spec.split_columns,
            "validation_splits": spec.validation_splits,
            "render": spec.render,
            "_choices": spec.num_choices,
            "benchmark": spec.benchmark,
        }
        return cls(spec.name, dataset, **{**given, **changes})

    @classmethod
    def named(cls, name: str, data_dir: str | Path | None = None, **changes: Any) -> Task:
        """A task of GLUE or SuperGLUE, with its data from a folder, or by name from the hub.

        Args:
            name: Name of the task, such as `"rte"`, `"STS-B"` or `"super_glue/rte"`.
            data_dir: See `load_task`.
            **changes: Fields of the task that shall differ.

        Raises:
            TaskDataError: See `load_task`.
        """
        if name.strip().lower().split("/")[-1] == "record":
            from .record import record_task

            return record_task(data_dir, **changes)
        spec, splits = load_task(name, data_dir)
        return cls.from_spec(spec, splits, **changes)

    @classmethod
    def from_folder(cls, folder: str | Path, **changes: Any) -> Task:
        """A task of one's own: a folder with `task.yaml` and its data as json lines, csv or parquet.

        `task.yaml` has the fields of this class except `dataset`, `loss`, `render` and `expand`; `name` is the name of
        the folder unless given. The files are called after the splits, such as `train.jsonl` and `validation.csv`.

        Raises:
            TaskDataError: If a file is missing or cannot be read.
            ConfigError: For fields that are unknown or not allowed.
        """
        from .folder import read_folder

        given, splits = read_folder(Path(folder))
        return cls(**{**given, "dataset": splits, **changes})


def check_tasks(tasks: Iterable[Task]) -> dict[str, Task]:
    """The tasks by name.

    Raises:
        ConfigError: If there is none, or two have one name, or one lacks rows to train on.
    """
    named: dict[str, Task] = {}
    for task in tasks:
        if not isinstance(task, Task):
            raise ConfigError(f"tasks has a {type(task).__name__}: pass Task objects.")
        if task.name in named:
            raise ConfigError(f"tasks has two called {task.name!r}: give one of them another name.")
        named[task.name] = task
    if not named:
        raise ConfigError("tasks is empty: pass at least one Task.")
    return named
