"""The examples of a task as tokens, kept in flat arrays, with their predictions and scores."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pal_adapters.checks import require_int, shown
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.metrics.builtin import NOT_PREDICTED, lower_is_better
from pal_adapters.multitask.metrics.custom import primary_name
from pal_adapters.multitask.model.heads import IGNORED

from .checks import check_columns
from .inputs import INPUTS, encode_segments, expanded, first_tokens, segments_of
from .labels import check_labels, has_flags, has_labels, numbered
from .rows import as_dataset, plain_rows
from .scoring import score_predictions
from .task import Task
from .types import TaskDataError
from .windows import Window, answer_span, best_answers, encode_questions

_CHUNK = 1000


class EncodedTask(torch.utils.data.Dataset[Any]):
    """Tokens and labels of the examples of a task, without padding. Each item is one example of a batch.

    A question with a long context yields several items, one for each window of the context. Words of a tagging task
    beyond `max_length` are not seen by the model: a warning says how many, and they count as wrong in the scores.

    Args:
        task: The task.
        rows: A split of its data, see `Task`.
        tokenizer: A fast tokenizer.
        max_length: Maximum number of tokens of an input; in a pair, the longer text is truncated first.
        where: What error messages call the examples.
        needs_labels: Whether every example must have a label. Examples to predict may lack labels: no label column,
            or only -1 or nothing in it, as in the test sets of GLUE.

    Raises:
        ConfigError: If `rows` is not of a type that `Task` accepts, or `max_length` leaves no room for text.
        TaskDataError: If there are no examples, a column is missing, or a label does not fit the task.
    """

    def __init__(
        self,
        task: Task,
        rows: Any,
        tokenizer: Any,
        max_length: int,
        *,
        where: str = "data",
        needs_labels: bool = True,
    ) -> None:
        if not isinstance(task, Task):
            raise ConfigError(f"task={shown(task)} is not allowed: use a Task.")
        self._where = where = f"task {task.name!r}, {where}"
        dataset = plain_rows(as_dataset(rows, where))
        if not callable(tokenizer) or not hasattr(tokenizer, "num_special_tokens_to_add"):
            raise ConfigError(f"tokenizer={shown(tokenizer)} is not allowed: use a tokenizer of transformers.")
        self.task = task
        self.max_length = max_length
        self.rows = plain_rows(expanded(task, dataset, where))
        self.has_labels = needs_labels or has_labels(task, self.rows)
        check_columns(task, self.rows, where, labels=self.has_labels)
        require_int("max_length", max_length, minimum=1)
        special = tokenizer.num_special_tokens_to_add(pair=task.kind == "span_qa")
        if max_length <= special:
            raise ConfigError(
                f"max_length={max_length} is not allowed: {special} special tokens leave no room for text."
            )
        flags = task.has_flags
        if flags is None and self.has_labels:
            flags = has_flags(task, self.rows)
        self._given: list[Any] = []
        if self.has_labels and task.label_column:
            self._given = numbered(task, self.rows, where)
            check_labels(task, self.rows, self._given, where, flags=bool(flags))
        self._tags: list[np.ndarray] = []  # for tagging, the label of each token
        self._words: list[
            np.ndarray
        ] = []  # for tagging, the first token of each word, -1 if the model does not see it
        self.windows: list[Window] = []  # for questions
        labels: list[Any] = []
        parts: dict[str, list[np.ndarray]] = {}
        lengths: list[np.ndarray] = []
        encode = {"token_tagging": self._encode_words, "span_qa": self._encode_questions}.get(
            task.kind, self._encode_texts
        )
        for start in range(0, len(self.rows), _CHUNK):
            encoded = encode(self.rows[start : start + _CHUNK], tokenizer, max_length, start, labels)
            lengths.append(np.fromiter(map(len, encoded["input_ids"]), dtype=np.int64))
            if not lengths[-1].all():
                row = start + int(lengths[-1].argmin()) // task.num_choices + 1
                raise TaskDataError(
                    f"{where}, row {row}: the tokenizer makes no token of the text: filter such rows out"
                )
            for name in INPUTS:
                if name in encoded:
                    flat = np.concatenate([np.asarray(tokens, np.int32) for tokens in encoded[name]])
                    parts.setdefault(name, []).append(flat)
        self.columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        self.offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        self.labels = self._label_array(labels, flags=bool(flags))
        if task.kind == "language_modeling" and not (self.lengths() > 1).any():
            raise TaskDataError(f"{where}: every text has one token, which leaves nothing to predict")
        if task.kind == "token_tagging" and self.has_labels and all((tags == IGNORED).all() for tags in self._tags):
            raise TaskDataError(f"{where}: every label is {IGNORED}, which leaves nothing to learn or to score")
        self._warn_of_words(max_length)

    def _encode_texts(self, chunk: Any, tokenizer: Any, max_length: int, start: int, labels: list[Any]) -> Any:
        rows = [dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True)]
        segments = segments_of(self.task, rows, self._where, start)
        if self.has_labels and self.task.label_column:
            labels += self._given[start : start + len(rows)]
        return encode_segments(tokenizer, segments, max_length)

    def _encode_words(self, chunk: Any, tokenizer: Any, max_length: int, start: int, labels: list[Any]) -> Any:
        words = chunk[self.task.text_columns[0]]
        encoded = tokenizer(words, truncation=True, max_length=max_length, is_split_into_words=True)
        for number, row in enumerate(words):
            numbers = encoded.word_ids(number)
            places = first_tokens(numbers, len(row))  # the first piece of a word carries its label
            self._words.append(places)
            if not self.has_labels:
                continue
            given = self._given[start + number]
            if len(row) != len(given):
                raise TaskDataError(
                    f"{self._where}, row {start + number + 1}: {len(given)} labels for {len(row)} words"
                )
            tags = np.full(len(numbers), IGNORED, dtype=np.int64)
            tags[places[places >= 0]] = np.asarray(given, dtype=np.int64)[places >= 0]
            self._tags.append(tags)
        return encoded

    def _encode_questions(self, chunk: Any, tokenizer: Any, max_length: int, start: int, labels: list[Any]) -> Any:
        questions, contexts = (chunk[column] for column in self.task.text_columns)
        encoded, windows = encode_questions(tokenizer, questions, contexts, max_length, self._where, start)
        self.windows += windows
        if self.has_labels:
            answers = chunk[self.task.label_column]
            labels += [answer_span(places, answers[row - start]) for row, places in windows]
        return encoded

    def _warn_of_words(self, max_length: int) -> None:
        unseen = [int((places < 0).sum()) for places in self._words]
        if any(unseen):
            example = next(number for number, count in enumerate(unseen) if count)
            warnings.warn(
                f"{self._where}: the model does not see {sum(unseen)} of {sum(map(len, self._words))} words: they lie "
                f"beyond max_length={max_length} or have no token, first in row {example + 1}. They count as wrong in "
                "the scores: raise max_length, or split such texts.",
                stacklevel=3,
            )

    def _label_array(self, labels: list[Any], *, flags: bool) -> np.ndarray | None:
        kind, classes = self.task.kind, self.task.num_labels
        if not self.has_labels or kind in ("token_tagging", "language_modeling"):
            return None
        if kind == "regression":
            return np.asarray(labels, dtype=np.float32)
        if kind == "multi_label":
            sets = np.zeros((len(labels), classes or 0), dtype=np.float32)
            for row, given in enumerate(labels):
                sets[row, np.flatnonzero(given) if flags else given] = 1.0
            return sets
        return np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.task.num_choices

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One example: the name of its task, its encoder inputs as arrays, and its label, `None` if it has none."""
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
            label[:1] = IGNORED  # with left padding, it would be predicted from padding
        else:
            assert self.labels is not None
            label = self.labels[row]
        return {"task": self.task.name, "inputs": inputs, "label": label}

    def lengths(self) -> np.ndarray:
        """Tokens of the longest encoder input of each example."""
        return np.diff(self.offsets).reshape(len(self), -1).max(axis=1)

    def predictions(self, logits: np.ndarray) -> Any:
        """The logits of all examples as classes, a 0 or 1 for each class, numbers, tags, or answers.

        Tags are lists with one tag for every word; -100 for a word that the model did not see.

        Args:
            logits: See `HeadConfig`; positions beyond the end of an example are ignored.
        """
        kind = self.task.kind
        if kind == "language_modeling":
            raise ConfigError(f"task {self.task.name!r}: a language model has no predictions.")
        if len(logits) != len(self):
            raise ConfigError(f"task {self.task.name!r}: {len(logits)} rows of logits for {len(self)} examples.")
        if kind == "token_tagging":
            tags = []
            for places, scored in zip(self._words, logits, strict=True):
                found = np.full(len(places), NOT_PREDICTED, dtype=np.int64)
                found[places >= 0] = scored[places[places >= 0]].argmax(-1)
                tags.append(found.tolist())
            return tags
        if kind == "span_qa":
            contexts = self.rows[self.task.text_columns[1]][:]
            return best_answers(contexts, self.windows, logits, unanswerable=self.task.has_unanswerable)
        if kind == "multi_label":
            return (logits > 0).astype(int)
        return np.asarray(logits, dtype=np.float64) if kind == "regression" else logits.argmax(-1)

    def score(self, logits: np.ndarray, loss: float | None = None) -> dict[str, float]:
        """All metrics of the task for the logits of all examples, in their order.

        Args:
            logits: See `HeadConfig`; positions beyond the end of an example are ignored.
            loss: Mean loss, for the perplexity of a language model.
        """
        if not self.has_labels:
            raise ConfigError(f"task {self.task.name!r}: without labels there are no scores: use predictions(logits).")
        if self.task.kind == "language_modeling":
            return {"perplexity": float(np.exp(min(loss if loss is not None else np.nan, 700.0)))}
        return score_predictions(self.task, self.rows, self.predictions(logits), self._true(), logits)

    def score_names(self) -> list[str]:
        """Names of the scores, found by scoring the labels as if they were the predictions.

        Raises:
            ConfigError: If two metrics return scores of the same name.
        """
        if self.task.kind == "language_modeling":
            return ["perplexity"]
        true = self._true()
        predicted = [(texts or [""])[0] for texts in true] if self.task.kind == "span_qa" else true
        return list(score_predictions(self.task, self.rows, predicted, true, None))

    def _true(self) -> Any:
        """The labels in the form of the predictions; for questions, all correct answers."""
        kind = self.task.kind
        if kind == "token_tagging":
            return self._given
        if kind == "span_qa":
            return [answer["text"] for answer in self.rows[self.task.label_column][:]]
        assert self.labels is not None
        return self.labels.astype(np.float64 if kind == "regression" else np.int64)

    def primary(self, found: dict[str, float]) -> float:
        """The score that selects the best checkpoint, of those that `score` returned; negated if lower is better."""
        name = primary_name(self.task.metrics[0], found)
        return -found[name] if lower_is_better(name) else found[name]


class ConcatTasks(torch.utils.data.Dataset[Any]):
    """The examples of all tasks, numbered consecutively, as `MultiTaskBatchSampler` numbers them."""

    def __init__(self, tasks: Sequence[EncodedTask]) -> None:
        if not isinstance(tasks, Sequence) or not all(isinstance(rows, EncodedTask) for rows in tasks) or not tasks:
            raise ConfigError(f"tasks={shown(tasks)} is not allowed: use a list of EncodedTask.")
        self.tasks = list(tasks)
        self._offsets = np.cumsum([0, *map(len, tasks)])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        task = int(np.searchsorted(self._offsets, row, side="right")) - 1
        return self.tasks[task][row - int(self._offsets[task])]
