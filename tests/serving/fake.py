"""A predictor without a model: what it answers can be computed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pal_adapters.errors import StorageError
from pal_adapters.multitask import RequestError


@dataclass(frozen=True)
class Description:
    kind: str
    text_columns: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    task: str
    label: str
    score: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"scores": {self.label: self.score}}


class FakePredictor:
    """The label of a request is its first column in capitals, its score one over the number of characters."""

    def __init__(self) -> None:
        self.tasks: dict[str, Description] = {
            "sentiment": Description("single_label", ("sentence",)),
            "pair": Description("single_label", ("premise", "hypothesis")),
        }
        self.batches: list[list[str]] = []

    def check(self, request: Mapping[str, Any]) -> None:
        if request["task"] not in self.tasks:
            raise RequestError(f"unknown task {request['task']!r}; allowed: {', '.join(self.tasks)}")
        for column in self.tasks[request["task"]].text_columns:
            if not isinstance(request.get(column), str):
                raise RequestError(f"column {column!r} is missing")

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
        self.batches.append([request["task"] for request in requests])
        answers = []
        for index, request in enumerate(requests):
            if request["task"] not in self.tasks:
                raise RequestError(f"unknown task {request['task']!r}", index=index)
            text = request[self.tasks[request["task"]].text_columns[0]]
            if text == "broken":
                raise RuntimeError("a secret of the server")
            answers.append(Answer(request["task"], text.upper(), 1 / len(text)))
        return answers

    def add_task(self, name: str, folder: Path) -> None:
        if not (folder / "task_heads.json").is_file():
            raise StorageError(f"{folder / 'task_heads.json'} is not there")
        self.tasks = {**self.tasks, name: Description("single_label", ("text",))}

    def remove_task(self, name: str) -> None:
        self.tasks = {task: description for task, description in self.tasks.items() if task != name}
