"""What goes in and out, for `/openapi.json`. `body.py` and `checks.py` check requests, not these classes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pal_adapters.multitask.model.heads import Kind


class PredictionRequest(BaseModel):
    """The name of a task, and the task's text columns as further fields; `GET /tasks` lists both."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"examples": [{"task": "sentiment", "sentence": "a fine film"}]}
    )
    task: str


class LabelAnswer(BaseModel):
    """Of a `single_label` task."""

    task: str
    label: str = Field(description="the most probable label")
    score: float = Field(description="its probability")
    scores: dict[str, float] = Field(description="the probability of each label; they sum to 1")


class LabelsAnswer(BaseModel):
    """Of a `multi_label` task."""

    task: str
    labels: list[str] = Field(
        description="the labels whose probability reaches their threshold, the most probable first"
    )
    scores: dict[str, float] = Field(description="the probability of each label; they do not sum to 1")


class NumberAnswer(BaseModel):
    """Of a `regression` task."""

    task: str
    value: float = Field(description="the number, or the first of several")
    values: dict[str, float] = Field(description="every number by its name")


class Entity(BaseModel):
    """A labeled part of a text."""

    label: str = Field(description="such as PER, without B- or I-")
    text: str
    start: int = Field(description="its first character in `text` of the answer")
    end: int = Field(description="the character after its last one")
    score: float = Field(description="mean probability of the labels of its words")


class EntitiesAnswer(BaseModel):
    """Of a `token_tagging` task."""

    task: str
    text: str = Field(description="the given text, or the given words joined by spaces")
    words: list[str]
    labels: list[str] = Field(description="the label of each word")
    entities: list[Entity]


class SpanAnswer(BaseModel):
    """Of a `span_qa` task."""

    task: str
    answer: str | None = Field(description="a part of the context; null if it has no answer")
    start: int | None = Field(description="its first character in the context")
    end: int | None = Field(description="the character after its last one")
    score: float = Field(description="its probability, or that of no answer")


class ChoiceAnswer(BaseModel):
    """Of a `multiple_choice` task."""

    task: str
    choice: str = Field(description="name of the choice, by default that of its column")
    text: str | None = Field(description="its text, if it is in a column of that name")
    score: float = Field(description="its probability")
    scores: dict[str, float] = Field(description="the probability of each choice; they sum to 1")


class TextAnswer(BaseModel):
    """Of a `language_modeling` task."""

    task: str
    text: str = Field(description="the continuation, generated or given")
    generated: bool
    log_probability: float = Field(description="sum of the natural logarithms of its tokens' probabilities")
    tokens: int = Field(description="number of its tokens")
    greedy: bool = Field(description="whether each of its tokens is the most probable one")


Answer = LabelAnswer | LabelsAnswer | NumberAnswer | EntitiesAnswer | SpanAnswer | ChoiceAnswer | TextAnswer


class TaskInfo(BaseModel):
    """A task, as `GET /tasks` describes it."""

    name: str
    kind: Kind
    text_columns: list[str] = Field(description="what a request needs besides `task`")
    label_names: list[str] = Field(description="names of the labels, numbers or choices")
    max_length: int = Field(description="tokens of an input; longer ones are truncated or cut into windows")
    template: str = Field(description="how the columns become the model's input")
    unanswerable: bool = Field(description="whether a question may have no answer")
    thresholds: list[float] = Field(description="for multi_label: smallest probability of each label; empty: 0.5")
    metric: str | None
    score: float | None = Field(description="of the saved weights, in that metric")


class Health(BaseModel):
    """The service answers."""

    status: str
    tasks: int = Field(description="number of tasks")
    waiting: int = Field(description="number of requests that wait for their batch")


class Problem(BaseModel):
    """Why a call was rejected; `index` and `task` name the request at fault, if it is a single one."""

    error: str
    index: int | None = Field(None, description="its place in the list, from 0")
    task: str | None = Field(None, description="its task, if the service has one of that name")


def request_body() -> dict[str, Any]:
    """What `/predict` takes, as OpenAPI describes it."""
    one = PredictionRequest.model_json_schema()
    schema = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


PROBLEMS = {
    400: "The body is not JSON",
    401: "Not the administrator's token",
    403: "The tasks of this service are fixed",
    404: "There is no such task or folder",
    409: "The task exists already",
    413: "The body is too large",
    415: "The body has another content type than application/json",
    422: "A request, or the folder of a task, cannot be used",
    503: "Too many requests are waiting, or the service is stopping; `Retry-After` says when to try again",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a call, as OpenAPI describes them."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": PROBLEMS[status]} for status in statuses
    }
    if 503 in found:
        seconds = {"description": "Seconds", "schema": {"type": "integer"}}
        found[503]["headers"] = {"Retry-After": seconds}
    return found
