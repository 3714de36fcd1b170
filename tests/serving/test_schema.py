"""`/openapi.json` says what the service does: answers, errors and statuses of every call."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx")

from pal_adapters.multitask.model.heads import KINDS
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.multitask.predict import predictions
from pal_adapters.serving import create_app, schema

from .fake import FakePredictor
from .test_app import FILM, call

STATUSES = {
    ("/predict", "post"): {"200", "400", "413", "415", "422", "503", "default"},
    ("/tasks", "get"): {"200", "default"},
    ("/health", "get"): {"200", "default"},
    ("/metrics", "get"): {"200", "default"},
    ("/tasks/{name}", "put"): {"201", "401", "403", "404", "409", "422", "default"},
    ("/tasks/{name}", "delete"): {"204", "401", "403", "404", "422", "default"},
}
DATACLASSES = [
    (predictions.LabelPrediction, schema.LabelAnswer),
    (predictions.LabelsPrediction, schema.LabelsAnswer),
    (predictions.NumberPrediction, schema.NumberAnswer),
    (predictions.EntitiesPrediction, schema.EntitiesAnswer),
    (predictions.AnswerPrediction, schema.SpanAnswer),
    (predictions.ChoicePrediction, schema.ChoiceAnswer),
    (predictions.TextPrediction, schema.TextAnswer),
    (predictions.Entity, schema.Entity),
    (TaskDescription, schema.TaskInfo),
]


@pytest.fixture(scope="module")
def document() -> Any:
    return call(create_app(FakePredictor()), ("GET", "/openapi.json"))[0].json()


def as_json(hint: Any) -> Any:
    """A type as JSON knows it: tuples are lists, mappings objects, and a class of one field list its fields."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple or origin is list:
        return list, as_json(inner[0])
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return dict, *map(as_json, inner)
    if origin is types.UnionType or "Union" in str(origin):
        return {as_json(one) for one in inner}
    return hint.__name__ if isinstance(hint, type) and hint.__module__ != "builtins" else hint


@pytest.mark.parametrize(("made", "described"), DATACLASSES)
def test_fields_are_those_of_the_predictor(made: Any, described: Any) -> None:
    hints = get_type_hints(made)
    fields = {one.name: as_json(hints[one.name]) for one in dataclasses.fields(made) if one.name != "array"}
    assert fields == {name: as_json(hint) for name, hint in get_type_hints(described).items() if name in
                      described.model_fields}  # fmt: skip
    assert all(field.is_required() for field in described.model_fields.values())


def test_every_kind_has_an_answer() -> None:
    named = {described.__doc__.split("`")[1] for _, described in DATACLASSES[:7]}
    assert named == set(KINDS)
    assert set(get_args(schema.Answer)) == {described for _, described in DATACLASSES[:7]}


def test_statuses_of_every_call(document: Any) -> None:
    found = {
        (path, method): set(call_["responses"])
        for path, calls in document["paths"].items()
        for method, call_ in calls.items()
    }
    assert found == STATUSES


def test_every_error_is_a_problem(document: Any) -> None:
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for calls in document["paths"].values():
        for call_ in calls.values():
            for status, response in call_["responses"].items():
                if not status.startswith("2"):
                    assert response["content"] == problem, status
    busy = document["paths"]["/predict"]["post"]["responses"]["503"]
    assert list(busy["headers"]) == ["Retry-After"]


def test_the_body_of_a_call(document: Any) -> None:
    content = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    one, many = content["application/json"]["schema"]["anyOf"]
    assert (one["required"], one["additionalProperties"]) == (["task"], True)
    assert many == {"type": "array", "items": one, "minItems": 1}


def test_types_of_answers(document: Any) -> None:
    def content(path: str, method: str, status: str) -> Any:
        return document["paths"][path][method]["responses"][status]["content"]

    one, many = _alternatives(content("/predict", "post", "200")["application/json"]["schema"])
    names = [described.__name__ for _, described in DATACLASSES[:7]]
    assert (one, many) == (names, names)
    tasks = content("/tasks", "get", "200")["application/json"]["schema"]
    assert tasks["additionalProperties"] == {"$ref": "#/components/schemas/TaskInfo"}
    added = content("/tasks/{name}", "put", "201")["application/json"]["schema"]
    assert added == {"$ref": "#/components/schemas/TaskInfo"}
    assert list(content("/metrics", "get", "200")) == ["text/plain"]
    assert "content" not in document["paths"]["/tasks/{name}"]["delete"]["responses"]["204"]


def _alternatives(found: Any) -> tuple[list[str], list[str]]:
    *single, many = found["anyOf"]
    flat = [inner for one in single for inner in one.get("anyOf", [one])]
    return _names(flat), _names(many["items"]["anyOf"])


def _names(references: Any) -> list[str]:
    return [one["$ref"].rpartition("/")[2] for one in references]


def test_the_token_is_a_bearer_token(document: Any) -> None:
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for method in ("put", "delete"):
        assert document["paths"]["/tasks/{name}"][method]["security"]
    assert "security" not in document["paths"]["/predict"]["post"]


def test_the_example_is_a_request() -> None:
    (example,) = schema.PredictionRequest.model_json_schema()["examples"]
    assert set(example) == set(FILM)
