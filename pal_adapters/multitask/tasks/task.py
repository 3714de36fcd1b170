"""A task: its data, its head, how its examples become text, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from pal_adapters.checks import require_one_of
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.metrics.builtin import default_metrics, metric_problem
from pal_adapters.multitask.metrics.custom import Metric, custom_metric_problem, flat_metrics, metric_name
from pal_adapters.multitask.model.heads import KINDS, HeadConfig, Kind, Loss, Pooling
from pal_adapters.multitask.model.names import require_task_name
from pal_adapters.multitask.model.task_description import COLUMNS, CUSTOM, TaskDescription, output_names

from .arguments import as_tuple, check_arguments
from .benchmark import read_benchmark
from .checks import check_split
from .folder import read_folder
from .glue import TASKS, find_tasks
from .labels import NAMED_KINDS, has_flags, has_unanswerable
from .rows import as_dataset, class_names, columns_of, text_labels
from .types import Row, Segments

Splits = Mapping[str, Any]
"""Examples by split: a `datasets.Dataset`, a list of dicts or a `pandas.DataFrame` each."""

_LABEL_COLUMNS = {"token_tagging": "tags", "span_qa": "answers", "language_modeling": None}
_TEXT_COLUMNS = {"token_tagging": ("tokens",), "span_qa": ("question", "context"), "language_modeling": ("text",)}
_TUPLES = ("text_columns", "label_names", "metrics", "validation_splits", "group_columns", "split_columns")
_NOT_IN_A_FILE = {"dataset", "loss", "render", "expand", "num_choices"}


@dataclass
class Task:
    r"""One of the tasks that a model is trained on.

    | `kind` | text columns | label column |
    |---|---|---|
    | `single_label` | a text or a pair | class number, or one of `label_names` |
    | `multi_label` | a text or a pair | list of class numbers or `label_names`, or a 0 or 1 for every class |
    | `regression` | a text or a pair | number |
    | `token_tagging` | list of words | class number of every word or one of `label_names`; -100 is ignored |
    | `span_qa` | question, context | `{"text": [...], "answer_start": [...]}` |
    | `multiple_choice` | a text, and each of the choices | number of the choice |
    | `language_modeling` | a text | none: the text itself |

    Args:
        name: Name of the task, of its head and, unless `adapter` says otherwise, of its adapter. At most 100 printable
            characters without `.`, `/` and `\`; not `average`, nor an attribute of `nn.ModuleDict` such as `type`.
        dataset: Splits by name: a `datasets.DatasetDict`, or a dict whose values are a `datasets.Dataset`, a list of
            dicts (one for each example) or a `pandas.DataFrame`.
        kind: What is predicted, see above.
        text_columns: Columns of the text. Tagging, questions and language models have default names.
        label_column: Column of the label.
        num_labels: Number of classes, or of numbers for a regression. Not needed with `label_names`.
        label_names: Names of the classes. By default those of the label column if it is a `datasets.ClassLabel`, or
            its distinct labels in sorted order if they are strings.
        metrics: Names of metrics, functions of predictions and references, or `evaluate` metrics. The first one
            selects the best checkpoint. The default depends on the kind.
        loss: A custom loss: the mean over the logits and labels of a batch.
        weight: Weight of its loss relative to other tasks.
        adapter: See `TaskHeads.add`.
        head: Name of an earlier task whose head is shared, instead of a head of its own.
        pooling: See `HeadConfig`.
        dropout: See `HeadConfig`.
        label_range: Smallest and largest label of a regression.
        train_split: Name of the split to train on.
        validation_splits: Names of the splits to evaluate on. The first one selects the best checkpoint.
        group_columns: Columns that identify the examples of one question, for `exact_match` of single labels.
        split_columns: Columns whose equal values must stay together when the training set is split.
        render: Turns an example into its encoder inputs, where its columns alone are not enough.
        num_choices: Number of encoder inputs that `render` returns for an example of `multiple_choice`; without
            `render` it follows from `text_columns`.
        expand: Turns a split into the examples to encode, where one example yields several.
        benchmark: Collection that the task belongs to, if any, such as `"glue"`.

    Raises:
        ConfigError: For invalid arguments, or arguments that do not fit together.

    Examples:
        >>> rows = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
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
    num_choices: int = 1
    expand: Callable[[datasets.Dataset], datasets.Dataset] | None = field(default=None, repr=False)
    benchmark: str = ""

    def __post_init__(self) -> None:
        require_task_name("name", self.name)
        require_one_of("kind", self.kind, KINDS)
        for name in _TUPLES:
            value = getattr(self, name)
            single = isinstance(value, str) or callable(value) or hasattr(value, "compute")
            setattr(self, name, as_tuple(f"task {self.name!r}: {name}", (value,) if single else value))
        if not self.text_columns:
            if self.kind not in _TEXT_COLUMNS:
                raise ConfigError(f"task {self.name!r}: text_columns is empty: name the columns of the text.")
            self.text_columns = _TEXT_COLUMNS[self.kind]
        check_arguments(self)
        self.dataset = self._splits()
        if self.label_column == "label" and self.kind in _LABEL_COLUMNS:
            usual = _LABEL_COLUMNS[self.kind]
            columns = {column for rows in self.dataset.values() for column in columns_of(rows)}
            if usual is None or usual in columns or "label" not in columns:
                self.label_column = usual
        if self.kind in NAMED_KINDS and not self.label_names:
            rows = self.dataset.get(self.train_split)
            names = class_names(rows, self.label_column) or text_labels(rows, self.label_column)
            self.label_names = names if self.num_labels in (None, len(names)) else ()
        if self.kind == "multiple_choice" and self.render is None:
            choices = len(self.text_columns) - 1
            if self.num_choices not in (1, choices):
                raise ConfigError(
                    f"task {self.name!r}: num_choices={self.num_choices}, but text_columns has {choices} choices: "
                    "leave it out."
                )
            self.num_choices = choices
        try:
            config = self.head_config()
        except ConfigError as error:
            raise ConfigError(f"task {self.name!r}: {error}") from error
        self.num_labels = config.num_labels
        self.metrics = flat_metrics(self.metrics) or default_metrics(self.kind, self.num_labels)
        self._check_metrics()

    def _splits(self) -> Mapping[str, datasets.Dataset]:
        if not isinstance(self.dataset, Mapping):
            raise ConfigError(
                f"task {self.name!r}: dataset is a {type(self.dataset).__name__}: pass a dict of splits, such as "
                f"{{{self.train_split!r}: rows}}."
            )
        where = f"task {self.name!r}: split"
        converted = {split: as_dataset(rows, f"{where} {split!r}") for split, rows in self.dataset.items()}
        same = all(converted[split] is rows for split, rows in self.dataset.items())
        return self.dataset if same else converted

    def _check_metrics(self) -> None:
        seen: set[str] = set()
        for metric in self.metrics:
            name = metric_name(metric)
            if name in seen:
                raise ConfigError(f"task {self.name!r}: two metrics are called {name!r}: give each its own name.")
            seen.add(name)
            if isinstance(metric, str):
                problem = metric_problem(metric, self.kind, self.num_labels, bool(self.group_columns))
            else:
                problem = custom_metric_problem(metric, self.kind, self.num_labels, self.label_names)
            if problem:
                raise ConfigError(f"task {self.name!r}: metric {name!r} {problem}.")

    @cached_property
    def has_unanswerable(self) -> bool:
        """Whether any training question is unanswerable, so that the model may also predict "no answer"."""
        return self.kind == "span_qa" and has_unanswerable(self)

    @cached_property
    def has_flags(self) -> bool | None:
        """Whether its label sets are given as a 0 or 1 for each class, in all splits; `None` without any labels."""
        return has_flags(self) if self.kind == "multi_label" else False

    @property
    def full_name(self) -> str:
        """Name with the benchmark in front, such as `glue/rte`."""
        return f"{self.benchmark}/{self.name}" if self.benchmark else self.name

    def head_config(self) -> HeadConfig:
        """The configuration of its head."""
        return HeadConfig(
            self.kind,
            self.num_labels,
            num_choices=self.num_choices,
            pooling=self.pooling,
            dropout=self.dropout,
            label_names=self.label_names if self.kind not in ("multiple_choice", "span_qa") else (),
        )

    def describe(
        self, *, max_length: int, score: float | None = None, thresholds: Sequence[float] = ()
    ) -> TaskDescription:
        """The task as plain data, to be saved with a model; see `TaskDescription`."""
        names = output_names(self.head_config())
        if self.kind == "multiple_choice":
            columns = self.text_columns[1 : self.num_choices + 1]
            names = self.label_names or (columns if len(columns) == self.num_choices else names)
        template = COLUMNS
        if self.render is not None:
            own = TASKS.get(self.full_name, {}).get("render") is self.render
            template = self.full_name if own else CUSTOM
        return TaskDescription(
            name=self.name,
            kind=self.kind,
            text_columns=self.text_columns,
            label_names=names,
            max_length=max_length,
            template=template,
            unanswerable=self.has_unanswerable,
            thresholds=tuple(thresholds),
            metric=metric_name(self.metrics[0]),
            score=score,
        )

    def segments(self, row: Row) -> list[Segments]:
        """Encoder inputs of an example, each a text or a pair."""
        if self.render is not None:
            return self.render(row)
        first, *rest = (row[column] for column in self.text_columns)
        if self.kind == "multiple_choice":
            return [(first, choice) for choice in rest]
        return [(first, rest[0] if rest else None)]

    def validation(self) -> dict[str, datasets.Dataset]:
        """The existing splits to evaluate on: the first under the task's name, others with the split's name added."""
        found = {}
        for number, split in enumerate(self.validation_splits):
            if split in self.dataset:
                suffix = split.removeprefix("validation").strip("_") or str(number)
                found[self.name if number == 0 else f"{self.name}_{suffix}"] = self.dataset[split]
        return found

    def with_data(self, dataset: Splits) -> Task:
        """The same task with other data."""
        return replace(self, dataset=dataset)

    @classmethod
    def from_spec(cls, spec: Task, dataset: Splits, **changes: Any) -> Task:
        """The task `spec`, such as one from `load_toy_task`, with data and with some fields changed."""
        return replace(spec, dataset=dataset, **changes)

    @classmethod
    def named(cls, name: str, data_dir: str | Path | None = None, **changes: Any) -> Task:
        """A GLUE or SuperGLUE task with its data; every example is checked.

        Args:
            name: Name of the task, such as `"rte"`, `"STS-B"` or `"super_glue/rte"`.
            data_dir: Folder with `<task>/train.jsonl` and `<task>/validation.jsonl` (for MNLI `validation_matched`
                and, optionally, `validation_mismatched`), or with folders `glue` and `super_glue` of such folders. The
                files may also end in `.json`, `.csv`, `.tsv` or `.parquet`, and in `.gz` after that. With `None` the
                data set of that name is loaded from the Hugging Face Hub.
            **changes: Fields of the task to change.

        Raises:
            TaskDataError: For an unknown task, a missing or unreadable file, a missing column, a split without
                examples, and labels that the task does not have. The message is one line and says where.
        """
        full, splits, places = read_benchmark(name, data_dir)
        task = get_task(full).with_data(splits)
        for split, place in places.items() if task.expand is None else ():
            check_split(task, task.dataset[split], place)
        return replace(task, **changes)

    @classmethod
    def from_folder(cls, folder: str | Path, **changes: Any) -> Task:
        """A custom task: a folder with `task.yaml` and one data file for each split.

        `task.yaml` has the fields of this class except `dataset`, `loss`, `render`, `num_choices` and `expand`; `name`
        is the folder's unless given. The files are named after the splits, such as `train.jsonl` and `validation.csv`;
        JSON, JSON lines, csv, tsv and parquet are read, also compressed with gzip.

        Args:
            folder: The folder.
            **changes: Fields of the task to set or change.

        Raises:
            TaskDataError: If a file is missing or cannot be read.
            ConfigError: For unknown or invalid fields.
        """
        given, splits = read_folder(Path(folder), {f.name for f in fields(cls)} - _NOT_IN_A_FILE)
        return cls(**{**given, "dataset": splits, **changes})


def get_task(name: str) -> Task:
    """The GLUE or SuperGLUE task of that name, without data; plain `rte` is the GLUE task.

    Raises:
        TaskDataError: If there is no task of that name.
    """
    full = find_tasks(name)[0]
    benchmark, short = full.split("/")
    return Task(short, {}, **TASKS[full], benchmark=benchmark)


def check_tasks(tasks: Iterable[Task]) -> dict[str, Task]:
    """The tasks by name.

    Raises:
        ConfigError: If there are none, two have the same name, or one is not a `Task`.
    """
    if isinstance(tasks, (Task, str)):
        raise ConfigError(f"tasks is a {type(tasks).__name__}: pass a list of Task objects.")
    named: dict[str, Task] = {}
    for task in tasks:
        if not isinstance(task, Task):
            raise ConfigError(f"tasks has a {type(task).__name__}: pass Task objects.")
        if task.name in named:
            raise ConfigError(f"two tasks are called {task.name!r}: rename one of them.")
        named[task.name] = task
    if not named:
        raise ConfigError("tasks is empty: pass at least one Task.")
    return named
