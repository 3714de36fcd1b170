"""From texts and the names of tasks to labels, numbers, entities and answers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import torch
from tqdm.auto import tqdm

from pal_adapters.checks import require_bool, require_int
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.multitask.model.readout import require_task
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.model.visiting import visiting
from pal_adapters.multitask.tasks.task import Task

from .adding import add_saved_task, read_saved_task, remove_saved_task, whole_change
from .decoding import decode
from .encoding import Piece, encode_requests
from .engines import Engine, TaskHeadsEngine
from .gate import Gate
from .generating import generate
from .host_models import HostEngine
from .loading import grown, load_predictor, served_tasks, shrunk
from .predictions import Prediction
from .requests import Request, RequestError, as_requests, check_request
from .running import run_pieces
from .served import ServedTasks

_MANY = 500
"""The number of requests from which a progress bar is shown unless `progress` says otherwise."""


class Predictor:
    """Answers requests for any tasks of one model, in batches that mix tasks.

    A request is a dict with `"task"` and the columns of the task, `predictor.tasks[name].text_columns`. All requests
    of a call are checked before the first one runs. Beside its columns,

    * a tagging task takes `"text"` instead of a list of words; it is split into words and punctuation marks,
    * a language model takes `"continuation"`, which is scored, or `"max_new_tokens"`, the most tokens to generate;
      each token is the most probable one.

    Long contexts of questions and long texts to tag are cut into overlapping windows of `max_length` tokens. Other
    texts are truncated to `max_length`, as in training; a language model loses the beginning of its text.

    Any number of threads may call one predictor. Predictions are made in evaluation mode and change neither what
    trains nor which adapter is active. A model in training mode is put into evaluation mode for as long as any call
    runs, which other threads that use the model notice.

    Adapters that the hosts trained one by one work as well, with the heads that the hosts gave them:

        model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(...), "rte", "rte")
        model.load_adapter("sst2", "sst2")  # with modules_to_save, as task_type="SEQ_CLS" sets it
        Predictor(model, tokenizer, [Task("rte", {}, text_columns=..., label_names=...), Task("sst2", {}, ...)])

    A task uses the adapter of its name and, in `adapters`, the head of its name; batches have one task then.

    Args:
        model: `TaskHeads`, a `PeftModel`, or a model of `adapters`.
        processing_class: The tokenizer. The predictor uses a copy of it.
        tasks: A `TaskDescription` or a `Task` for each task of the model that requests may ask for. A `Task` is
            described with the tokenizer's `model_max_length`, at most 512. By default the tasks that were saved with
            the model.
        max_tokens_per_batch: Largest number of tokens in a batch, with padding: a smaller one needs less memory. A
            longer request is a batch of its own.

    Raises:
        ConfigError: For a task that the model lacks, or that does not fit its head.

    Example:
        >>> predictor = Predictor.from_pretrained("out/best")  # doctest: +SKIP
        >>> predictor("a fine film", task="sentiment").label  # doctest: +SKIP
        'positive'
    """

    def __init__(
        self,
        model: Any,
        processing_class: Any,
        tasks: Iterable[Task | TaskDescription] | None = None,
        *,
        max_tokens_per_batch: int = 4096,
    ) -> None:
        require_int("max_tokens_per_batch", max_tokens_per_batch, minimum=1)
        if processing_class is None or getattr(processing_class, "pad_token_id", None) is None:
            raise ConfigError("processing_class needs to be a tokenizer with a padding token.")
        tasks = None if tasks is None else list(tasks)
        self._engine: Engine = (
            TaskHeadsEngine(model) if isinstance(model, TaskHeads) else HostEngine(model, tasks or ())
        )
        # The settings of a fast tokenizer belong to the object, not to the call.
        self._tokenizer = copy.deepcopy(processing_class)
        self._tokenizing = threading.Lock()
        self._gate = Gate()
        self._changing = threading.Lock()
        self._limit = max_tokens_per_batch
        self._served = ServedTasks(served_tasks(self._engine, self._tokenizer, tasks), self._tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        tasks: Iterable[Task | TaskDescription] | None = None,
        backbone: Any = None,
        processing_class: Any = None,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        max_tokens_per_batch: int = 4096,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Predictor:
        """Reads a folder that `TaskHeads.save_pretrained` or the `MultiTaskTrainer` wrote.

        Args:
            directory: The folder, or a Hub repo ID, `"owner/name"`.
            tasks: See `Predictor`; they replace the saved descriptions of the same names, which a folder of an earlier
                release lacks.
            backbone: See `TaskHeads.from_pretrained`.
            processing_class: The tokenizer, if the folder has none.
            device: Where to put the model.
            dtype: Type of its weights, such as `torch.bfloat16` or `"bfloat16"`; by default float32.
            max_tokens_per_batch: See `Predictor`.
            revision: Branch, tag or commit of a repository.
            token: Token for the Hub; by default that of the login.

        Raises:
            StorageError: If the folder is incomplete, damaged or does not fit the model.
            ConfigError: If an argument is not allowed, or the folder lacks the tokenizer or a task.
        """
        model, tokenizer, described = load_predictor(
            directory,
            tasks=tasks,
            backbone=backbone,
            processing_class=processing_class,
            device=device,
            dtype=dtype,
            revision=revision,
            token=token,
        )
        return cls(model, tokenizer, described, max_tokens_per_batch=max_tokens_per_batch)

    @property
    def tasks(self) -> Mapping[str, TaskDescription]:
        """The tasks that requests may ask for."""
        return MappingProxyType(self._served.descriptions)

    def add_task(self, name: str, folder: str | Path) -> None:
        """Adds a task that was saved on the same base model, with its adapter and head, or nothing.

        Running calls finish first; calls made meanwhile wait.

        Args:
            name: The name of the task: one of the folder's tasks or, if the folder has only one, any name.
            folder: A folder of `TaskHeads.save_pretrained` or the `MultiTaskTrainer`, on disk.

        Raises:
            ConfigError: If there is a task of that name already, or none in the folder.
            StorageError: If the folder is incomplete, damaged or does not fit the model.
            UnsupportedError: If it was saved on another base model, or needs another host.
        """
        model = self._task_heads()
        with self._changing:
            with self._tokenizing:
                saved = read_saved_task(model, self._tokenizer, name, Path(folder))
            with self._gate.change(), self._tokenizing:
                with whole_change(model):
                    add_saved_task(model, saved)
                    served = grown(self._served, saved.description, self._engine, self._tokenizer)
                self._served = served

    def remove_task(self, name: str) -> None:
        """Removes a task with its head and, unless another task uses it, its adapter.

        Running calls finish first; calls made meanwhile wait.

        Raises:
            UnknownAdapterError: If there is no task of that name.
        """
        model = self._task_heads()
        with self._changing:
            require_task(name, tuple(self._served.tasks))
            with self._gate.change(), self._tokenizing:
                with whole_change(model):
                    remove_saved_task(model, name)
                    served = shrunk(self._served, name, self._engine, self._tokenizer)
                self._served = served

    def _task_heads(self) -> TaskHeads:
        if not isinstance(self._engine, TaskHeadsEngine):
            raise UnsupportedError("the tasks of a host's own model are fixed: build the predictor from TaskHeads.")
        return self._engine.model

    def check(self, request: Mapping[str, Any]) -> None:
        """Raises `RequestError` for a request that cannot be answered. The model does not run."""
        self._encoded([request], self._served)

    @overload
    def __call__(
        self,
        requests: str | Mapping[str, Any],
        *,
        task: str | None = None,
        arrays: bool = False,
        progress: bool | None = None,
    ) -> Prediction: ...

    @overload
    def __call__(
        self,
        requests: Sequence[Any],
        *,
        task: str | Sequence[str] | None = None,
        arrays: bool = False,
        progress: bool | None = None,
    ) -> list[Prediction]: ...

    def __call__(
        self,
        requests: Any,
        *,
        task: Any = None,
        arrays: bool = False,
        progress: bool | None = None,
    ) -> Prediction | list[Prediction]:
        """Answers one request or many.

        Args:
            requests: A list of requests, one request, or just its text if the task has only one column.
            task: The task of texts and of requests without `"task"`; for one text or request, also a list of tasks.
            arrays: Whether predictions carry the numbers that they were read from, in `array`.
            progress: Whether to show a progress bar; by default for 500 requests and more.

        Returns:
            The predictions in the order of the requests or, for several tasks, of the tasks; for one request and one
            task, the prediction itself.

        Raises:
            RequestError: For the first request that cannot be answered, before any request runs.
        """
        require_bool("arrays", arrays)
        single = isinstance(requests, (str, Mapping)) and (task is None or isinstance(task, str))
        asked = as_requests(requests, task)
        shown = progress if progress is not None else len(asked) >= _MANY
        with self._gate.call():
            served = self._served
            checked, pieces = self._encoded(asked, served)
            with tqdm(total=sum(map(len, pieces)), disable=not shown, unit="text") as bar:
                predictions = self._answers(checked, pieces, served, bar.update)
        found = [one if arrays else replace(one, array=None) for one in predictions]
        return found[0] if single else found

    def _encoded(self, asked: Sequence[Any], served: ServedTasks) -> tuple[list[Request], list[list[Piece]]]:
        """The checked requests and their pieces; the first invalid one raises an error."""
        requests = [check_request(given, index, served.descriptions) for index, given in enumerate(asked)]
        by_task: dict[str, list[Request]] = {}
        for request in requests:
            by_task.setdefault(request.task, []).append(request)
        pieces: list[list[Piece]] = [[] for _ in requests]
        errors: list[RequestError] = []
        with self._tokenizing:
            for task, some in by_task.items():
                try:
                    for piece in encode_requests(some, served[task], self._tokenizer):
                        pieces[piece.request.index].append(piece)
                except RequestError as error:
                    errors.append(error)
        if errors:
            raise min(errors, key=lambda error: error.index)
        return requests, pieces

    def _answers(
        self,
        requests: Sequence[Request],
        pieces: Sequence[Sequence[Piece]],
        served: ServedTasks,
        done: Callable[[int], Any],
    ) -> list[Prediction]:
        found: dict[int, Prediction] = {}
        prompts: dict[str, list[Piece]] = {}
        plain: list[Piece] = []
        for request, some in zip(requests, pieces, strict=True):
            if served[request.task].task.kind == "language_modeling" and "continuation" not in request.row:
                prompts.setdefault(request.task, []).extend(some)
            else:
                plain += some
        with visiting(self._engine.model, self._engine.backbone):
            outputs = iter(run_pieces(plain, served, self._engine, self._limit, done))
            for task, some in prompts.items():
                made = generate(some, served[task], self._engine, self._tokenizer, self._limit, done)
                found |= {piece.request.index: one for piece, one in zip(some, made, strict=True)}
        for request, some in zip(requests, pieces, strict=True):
            if request.index not in found:
                own = [next(outputs) for _ in some]
                found[request.index] = decode(request, some, own, served[request.task])
        return [found[request.index] for request in requests]
