"""The service with a real predictor: answers over HTTP are the predictor's own."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx")

from transformers import AutoModel, AutoTokenizer

from pal_adapters.multitask import HeadConfig, Predictor, TaskHeads
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.serving import ServingOptions, create_app
from tests.multitask.tiny_encoder import save_tiny_encoder

from .test_app import call

TASKS = {
    "mood": (HeadConfig("single_label", 2), ("text",), ("bad", "good")),
    "nli": (HeadConfig("single_label", 3), ("premise", "hypothesis"), ("yes", "maybe", "no")),
    "tags": (HeadConfig("token_tagging", 3), ("tokens",), ("O", "B-X", "I-X")),
    "stars": (HeadConfig("regression", 1), ("text",), ("stars",)),
}
REQUESTS: list[dict[str, Any]] = [
    {"task": "mood", "text": "it was good."},
    {"task": "nli", "premise": "it was.", "hypothesis": "she is here."},
    {"task": "tags", "text": "she is here"},
    {"task": "stars", "text": "it was good."},
    {"task": "mood", "text": "she reads."},
]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("served")
    name = save_tiny_encoder(folder / "base")
    model = TaskHeads(AutoModel.from_pretrained(name))
    for task, (head, *_) in TASKS.items():
        model.add(task, head)
    described = [TaskDescription(task, head.kind, columns, names) for task, (head, columns, names) in TASKS.items()]
    model.save_pretrained(folder / "out", processing_class=AutoTokenizer.from_pretrained(name), tasks=described)
    return Predictor.from_pretrained(folder / "out")


def close(found: Any, expected: Any) -> bool:
    """Whether two predictions agree, up to rounding that depends on the batch."""
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(close(found[name], value) for name, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


def test_answers_are_those_of_the_predictor(predictor: Predictor) -> None:
    expected = [answer.to_dict() for answer in predictor(REQUESTS)]
    app = create_app(predictor, ServingOptions(max_batch=10, max_wait_ms=60_000))
    calls = [("POST", "/predict", {"json": request}) for request in REQUESTS]
    *single, together = call(app, *calls, ("POST", "/predict", {"json": REQUESTS}), together=True)
    assert close([found.json() for found in single], expected)
    assert close(together.json(), expected)


def test_what_the_predictor_rejects_has_the_place_of_the_request(predictor: Predictor) -> None:
    (found,) = call(
        create_app(predictor), ("POST", "/predict", {"json": [REQUESTS[0], {"task": "nli", "premise": "x"}]})
    )
    assert found.status_code == 422
    assert found.json()["index"] == 1
    assert found.json()["task"] == "nli"
    assert "'hypothesis'" in found.json()["error"]


def test_tasks_say_what_a_request_needs(predictor: Predictor) -> None:
    (found,) = call(create_app(predictor), ("GET", "/tasks"))
    assert {name: task["text_columns"] for name, task in found.json().items()} == {
        name: list(columns) for name, (_, columns, _) in TASKS.items()
    }
    assert found.json()["nli"]["label_names"] == ["yes", "maybe", "no"]
