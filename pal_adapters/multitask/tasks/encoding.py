"""The rows of a task as tokens, kept in flat arrays, and what their scores are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch

from pal_adapters.errors import ConfigError
from pal_adapters.multitask.metrics import scores
from pal_adapters.multitask.metrics.custom import Metric, primary_name, score_own
from pal_adapters.multitask.model.heads import IGNORED

from .glue import TaskDataError
from .labels import check_labels, has_flags, has_labels, numbered, plain_rows
from .task import Task

_CHUNK = 1000
_LONGEST_ANSWER = 30


class EncodedTask(torch.utils.data.Dataset[Any]):
    """Tokens and labels of the rows of a task, without padding. One item is one row of a batch.

    A question with a long context makes several items, one for each window of the context.

    Args:
        task: The task.
        rows: A split of its data.
        tokenizer: A fast tokenizer.
        max_length: Tokens after which a text is cut, the longer one of a pair first.
        where: What to call the rows in error messages.
        needs_labels: Whether every row must have a label. Rows to predict may lack them: with no column of labels, or
            with -1 or nothing in each row, as in the test sets of GLUE.

    Raises:
        ConfigError: If the rows are not a `datasets.Dataset`.
        TaskDataError: If there are no rows, a column is missing, or a label does not fit the task.
    """

    def __init__(
        self,
        task: Task,
        rows: datasets.Dataset,
        tokenizer: Any,
        max_length: int,
        *,
        where: str = "data",
        needs_labels: bool = True,
    ) -> None:
        if not isinstance(rows, datasets.Dataset):
            raise ConfigError(f"task {task.name!r}, {where}: rows is of type {type(rows).__name__}: pass a Dataset.")
        self.task = task
        self.rows = plain_rows(rows if task.expand is None else task.expand(plain_rows(rows)))
        self.has_labels = needs_labels or has_labels(task, self.rows)
        self._check(where)
        flags = task.has_flags
        if flags is None and self.has_labels:
            flags = has_flags(task, self.rows)
        self._flags = bool(flags)
        self._primary = ""
        self._given: list[Any] = []
        if self.has_labels and task.label_column:
            self._given = numbered(task, self.rows, where)
            check_labels(task, self.rows, self._given, where, flags=self._flags)
        self._arrays: dict[str, list[np.ndarray]] = {}
        lengths: list[np.ndarray] = []
        self._tags: list[np.ndarray] = []
        # Of questions: the row of each window, and where its tokens stand in the context.
        self.windows: list[tuple[int, np.ndarray]] = []
        labels: list[Any] = []
        for start in range(0, len(self.rows), _CHUNK):
            chunk = self.rows[start : start + _CHUNK]
            encode = {"token_tagging": self._encode_words, "span_qa": self._encode_questions}.get(task.kind)
            encoded = (encode or self._encode_texts)(chunk, tokenizer, max_length, start, labels)
            lengths.append(np.fromiter(map(len, encoded["input_ids"]), dtype=np.int64))
            if not lengths[-1].all():
                row = start + int(lengths[-1].argmin()) // task.num_choices + 1
                raise TaskDataError(
                    f"task {task.name!r}, {where}, row {row}: the tokenizer makes no tokens of the text: filter such "
                    "rows out"
                )
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                if name in encoded:
                    self._arrays.setdefault(name, []).append(
                        np.concatenate([np.asarray(r, np.int32) for r in encoded[name]])
                    )
        self.columns = {name: np.concatenate(parts) for name, parts in self._arrays.items()}
        self._arrays = {}
        self.offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        self.labels = self._label_array(labels)
        if task.kind == "language_modeling" and not (self.lengths() > 1).any():
            raise TaskDataError(f"task {task.name!r}, {where}: texts of one token leave nothing to predict")

    def _check(self, where: str) -> None:
        task = self.task
        if len(self.rows) == 0:
            raise TaskDataError(f"task {task.name!r}, {where}: no rows")
        if self.has_labels and not task.label_column and task.kind != "language_modeling":
            raise TaskDataError(f"task {task.name!r}, {where}: no labels, as the task has no label_column")
        needed = [*task.text_columns]
        if self.has_labels:
            needed += [*([task.label_column] if task.label_column else []), *task.group_columns]
        for column in needed:
            if column not in self.rows.column_names:
                found = ", ".join(self.rows.column_names)
                raise TaskDataError(f"task {task.name!r}, {where}: no column {column!r}; found: {found}")
        for column in task.text_columns:
            kind = list if task.kind == "token_tagging" else str
            for number, value in enumerate(self.rows[column][:] if task.render is None else (), start=1):
                if not isinstance(value, kind):
                    raise TaskDataError(
                        f"task {task.name!r}, {where}, row {number}: column {column!r} holds {value!r:.40}, not a "
                        f"{'list of words' if kind is list else 'text'}"
                    )

    def _encode_texts(self, chunk: Any, tokenizer: Any, max_length: int, start: int, labels: list[Any]) -> Any:
        task = self.task
        count = len(next(iter(chunk.values())))
        records = [{name: values[i] for name, values in chunk.items()} for i in range(count)]
        segments = [segment for record in records for segment in task.segments(record)]
        if len(segments) != count * task.num_choices:
            raise TaskDataError(f"task {task.name!r}: {len(segments)} encoder inputs for {count} rows")
        first = [a for a, _ in segments]
        texts = (first, [b for _, b in segments]) if segments[0][1] is not None else (first,)
        if self.has_labels and task.label_column:
            labels += self._given[start : start + count]
        return tokenizer(*texts, truncation=True, max_length=max_length)

    def _encode_words(self, chunk: Any, tokenizer: Any, max_length: int, start: int, labels: list[Any]) -> Any:
        words = chunk[self.task.text_columns[0]]
        # Without labels a 0 marks the words that get one.
        tags = self._given[start : start + len(words)] if self.has_labels else [[0] * len(row) for row in words]
        encoded = tokenizer(words, truncation=True, max_length=max_length, is_split_into_words=True)
        for number, (row, given) in enumerate(zip(words, tags, strict=True)):
            if len(row) != len(given):
                raise TaskDataError(
                    f"task {self.task.name!r}, row {start + number + 1}: {len(given)} labels for {len(row)} words"
                )
            before, out = None, []
            for word in encoded.word_ids(number):  # the first piece of a word has its label
                out.append(IGNORED if word is None or word == before else given[word])
                before = word
            self._tags.append(np.asarray(out, dtype=np.int64))
        return encoded

    def _encode_questions(self, chunk: Any, tokenizer: Any, max_length: int, start: int, labels: list[Any]) -> Any:
        questions, contexts = (chunk[column] for column in self.task.text_columns)
        encoded = tokenizer(
            [question.lstrip() for question in questions],
            contexts,
            truncation="only_second",
            max_length=max_length,
            stride=min(128, max_length // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            places = np.asarray(encoded["offset_mapping"][window], dtype=np.int64).copy()  # [n, 2]
            places[[part != 1 for part in encoded.sequence_ids(window)]] = -1
            self.windows.append((start + row, places))
            if self.has_labels:
                labels.append(_span(places, chunk[self.task.label_column][row]))
        return encoded

    def _label_array(self, labels: list[Any]) -> np.ndarray | None:
        kind, classes = self.task.kind, self.task.num_labels
        if not self.has_labels or kind in ("token_tagging", "language_modeling"):
            return None
        if kind == "regression":
            return np.asarray(labels, dtype=np.float32)
        if kind == "multi_label":
            sets = np.zeros((len(labels), classes or 0), dtype=np.float32)
            for row, given in enumerate(labels):
                sets[row, np.flatnonzero(given) if self._flags else given] = 1.0
            return sets
        return np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.task.num_choices

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Row of a batch: the name of the task, its encoder inputs as arrays, and its label, `None` if it has none."""
        choices = self.task.num_choices
        inputs = []
        for number in range(row * choices, (row + 1) * choices):
            part = slice(self.offsets[number], self.offsets[number + 1])
            inputs.append({name: column[part] for name, column in self.columns.items()})
        label: Any = None
        if not self.has_labels:
            pass
        elif self.task.kind == "token_tagging":
            label = self._tags[row]
        elif self.task.kind == "language_modeling":
            label = inputs[0]["input_ids"].copy()
            label[:1] = IGNORED  # or padding on the left would be what it is predicted from
        else:
            assert self.labels is not None
            label = self.labels[row]
        return {"task": self.task.name, "inputs": inputs, "label": label}

    def lengths(self) -> np.ndarray:
        """Tokens of the longest encoder input of each row."""
        return np.diff(self.offsets).reshape(len(self), -1).max(axis=1)

    def predictions(self, logits: np.ndarray) -> Any:
        """What the logits of all rows say: classes, 0 or 1 for each class, numbers, tags of words, or answers.

        Args:
            logits: See `HeadConfig`; what stands behind the end of a row is not looked at.
        """
        kind = self.task.kind
        if kind == "language_modeling":
            raise ConfigError(f"task {self.task.name!r}: a language model has no predictions.")
        if len(logits) != len(self):
            raise ConfigError(f"task {self.task.name!r}: {len(logits)} rows of logits for {len(self)} rows.")
        if kind == "token_tagging":
            keep = [tags != IGNORED for tags in self._tags]
            return [logits[i, : len(k)][k].argmax(-1).tolist() for i, k in enumerate(keep)]
        if kind == "span_qa":
            return self._answers(logits)
        if kind == "multi_label":
            return (logits > 0).astype(int)
        return np.asarray(logits, dtype=np.float64) if kind == "regression" else logits.argmax(-1)

    def score(self, logits: np.ndarray, loss: float | None = None) -> dict[str, float]:
        """All metrics of the task for the logits of all rows, in their order.

        Args:
            logits: See `HeadConfig`; what stands behind the end of a row is not looked at.
            loss: Mean loss, for the perplexity of a language model.
        """
        task = self.task
        names = [metric for metric in task.metrics if isinstance(metric, str)]
        found: dict[str, float] = {}
        true: Any
        if not self.has_labels:
            raise ConfigError(f"task {task.name!r}: rows without labels have no scores: use predictions(logits).")
        if task.kind == "language_modeling":
            self._primary = "perplexity"
            return {"perplexity": float(np.exp(min(loss if loss is not None else np.nan, 700.0)))}
        predicted = self.predictions(logits)
        if task.kind == "token_tagging":
            true = [tags[tags != IGNORED].tolist() for tags in self._tags]
            found = scores.score_tags(names, predicted, true, task.label_names)
        elif task.kind == "span_qa":
            true = [answer["text"] for answer in self.rows[task.label_column][:]]
            found = scores.score_answers(names, predicted, true)
        elif task.kind == "multi_label":
            assert self.labels is not None
            true = self.labels.astype(int)
            found = scores.score_label_sets(names, predicted, true)
        else:
            assert self.labels is not None
            numbers = task.kind == "regression"
            true = self.labels.astype(np.float64 if numbers else np.int64)
            if names:
                found = scores.score_rows(task.name, names, predicted, true, groups=self._groups(), numbers=numbers)
        scored: dict[str, float] = {}
        for number, metric in enumerate(task.metrics):
            if isinstance(metric, str):
                given = {metric: found[metric]}
            elif getattr(metric, "takes_rows", False):
                given = metric(self, logits)
            else:
                given = self._score_own(metric, predicted, true)
            twice = sorted(scored.keys() & given.keys())
            if twice:
                raise ConfigError(
                    f"task {task.name!r}: two metrics give a score called {twice[0]!r}: use functions with names of "
                    "their own."
                )
            scored |= given
            if number == 0:
                self._primary = primary_name(metric, given)
        return scored

    def _score_own(self, metric: Metric, predicted: Any, true: Any) -> dict[str, float]:
        task = self.task
        answers = self.rows[task.label_column][:] if task.kind == "span_qa" else None
        return score_own(metric, predicted, true, kind=task.kind, label_names=task.label_names, answers=answers)

    def primary(self, found: dict[str, float]) -> float:
        """Of what `score` found, the score that models are chosen by, turned round if less is better."""
        return -found[self._primary] if scores.lower_is_better(self._primary) else found[self._primary]

    def _groups(self) -> list[Any] | None:
        columns = self.task.group_columns
        return list(zip(*(self.rows[column][:] for column in columns), strict=True)) if columns else None

    def _answers(self, logits: np.ndarray) -> list[str]:
        """For each question the best span over all windows of its context, or "" for none.

        None is a span too, the first token of all; it wins if it beats the best one, in every window. Windows that
        lack the answer are taught it as well, so it is not looked at where every question has an answer.
        """
        best = [(-np.inf, "")] * len(self.rows)
        none = np.full(len(self.rows), np.inf if self.task.has_unanswerable else -np.inf)
        contexts = self.rows[self.task.text_columns[1]]
        for (row, places), scored in zip(self.windows, logits, strict=True):
            none[row] = min(none[row], scored[0].sum())
            inside = np.flatnonzero(places[:, 0] >= 0)
            if not len(inside):
                continue
            start, end = (scored[inside, side] for side in (0, 1))
            total = start[:, None] + end[None, :]
            length = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
            total = np.where((length >= 0) & (length < _LONGEST_ANSWER), total, -np.inf)
            first, last = np.unravel_index(total.argmax(), total.shape)
            if total[first, last] > best[row][0]:
                text = contexts[row][places[inside[first], 0] : places[inside[last], 1]]
                best[row] = (float(total[first, last]), text)
        return [text if total >= least else "" for (total, text), least in zip(best, none, strict=True)]


def _span(places: np.ndarray, answer: Any) -> tuple[int, int]:
    """First and last token of the first answer, or the first token of all where the window lacks it."""
    if not any(answer["text"][:1]):
        return 0, 0
    start = answer["answer_start"][0]
    end = start + len(answer["text"][0])
    holds_start = np.flatnonzero((places[:, 0] <= start) & (places[:, 1] > start) & (places[:, 0] >= 0))
    holds_end = np.flatnonzero((places[:, 0] < end) & (places[:, 1] >= end) & (places[:, 0] >= 0))
    if not len(holds_start) or not len(holds_end):
        return 0, 0
    return int(holds_start[0]), int(holds_end[-1])


class ConcatTasks(torch.utils.data.Dataset[Any]):
    """The rows of all tasks, numbered through, as `MultiTaskBatchSampler` numbers them."""

    def __init__(self, tasks: Sequence[EncodedTask]) -> None:
        self.tasks = list(tasks)
        self._offsets = np.cumsum([0, *map(len, tasks)])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        task = int(np.searchsorted(self._offsets, row, side="right")) - 1
        return self.tasks[task][row - int(self._offsets[task])]
