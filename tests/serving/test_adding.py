"""Tasks that come and go over HTTP, with real folders: answers are those of a predictor that has only their folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx")
pytest.importorskip("peft")

import torch
from peft import get_peft_model
from transformers import AutoModel, AutoTokenizer

from pal_adapters import PALPeftConfig
from pal_adapters.multitask import HeadConfig, Predictor, TaskHeads
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.serving import ServingOptions, create_app
from tests.multitask.tiny_encoder import save_tiny_encoder

from .test_app import TOKEN, admin, call
from .test_predictor import close

MOOD = {"task": "mood", "text": "it was good."}
TOPIC = {"task": "topic", "text": "she reads."}
LABELS = {"mood": ("bad", "good"), "topic": ("tea", "coffee", "milk"), "tone": ("calm", "loud")}


def save(folder: Path, base: str, *tasks: str, base_trained: bool = False) -> None:
    """A folder with an adapter and a head for each task, with random weights."""
    first, *others = tasks
    config = PALPeftConfig(hidden_size=4, num_heads=2)
    backbone: Any = get_peft_model(AutoModel.from_pretrained(base), config, adapter_name=first)
    for task in others:
        backbone.add_adapter(task, config)
    model = TaskHeads(backbone)
    for task in tasks:
        model.add(task, HeadConfig("single_label", len(LABELS[task])))
    model.prepare_training(base=base_trained)
    generator = torch.Generator().manual_seed(len(folder.name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)
    described = [TaskDescription(task, "single_label", ("text",), LABELS[task]) for task in tasks]
    model.save_pretrained(folder, processing_class=AutoTokenizer.from_pretrained(base), tasks=described)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adding")
    base, other = (save_tiny_encoder(place / name) for name in ("base", "other_base"))
    save(place / "served", base, "mood")
    root = place / "root"
    save(root / "topic", base, "topic")
    save(root / "renamed", base, "topic")
    save(root / "tone", base, "mood", "tone")
    save(root / "two", base, "mood", "topic")
    save(root / "stranger", other, "topic")
    save(root / "trained", base, "topic", base_trained=True)
    shutil.copytree(root / "topic", root / "damaged")
    heads = root / "damaged" / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-8])
    shutil.copytree(root / "topic", root / "incomplete")
    shutil.rmtree(root / "incomplete" / "topic")
    return place


@pytest.fixture
def app(place: Path) -> Any:
    options = ServingOptions(tasks_root=str(place / "root"))
    return create_app(Predictor.from_pretrained(place / "served"), options, admin_token=TOKEN)


def alone(folder: Path, request: dict[str, Any]) -> Any:
    """The answer of a predictor that was loaded from this folder."""
    found: Any = Predictor.from_pretrained(folder)([request])
    return found[0].to_dict()


def test_a_task_is_added_answers_and_is_removed(place: Path, app: Any) -> None:
    early, added, again, one, mixed, removed, late, gone, mood = call(
        app, ("POST", "/predict", {"json": TOPIC}), admin("PUT", "topic"), admin("PUT", "topic"),
        ("POST", "/predict", {"json": TOPIC}), ("POST", "/predict", {"json": [MOOD, TOPIC, MOOD]}),
        admin("DELETE", "topic"), ("POST", "/predict", {"json": TOPIC}), admin("DELETE", "topic"),
        ("POST", "/predict", {"json": MOOD}),
    )  # fmt: skip
    topic = alone(place / "root" / "topic", TOPIC)
    expected = alone(place / "served", MOOD)
    described = TaskDescription("topic", "single_label", ("text",), LABELS["topic"]).to_dict()
    assert (early.status_code, added.status_code, again.status_code) == (422, 201, 409)
    assert added.json() == {name: list(v) if isinstance(v, tuple) else v for name, v in described.items()}
    assert close(one.json(), topic)
    assert close(mixed.json(), [expected, topic, expected])
    assert (removed.status_code, removed.content) == (204, b"")
    assert (late.status_code, late.json()["index"], gone.status_code) == (422, 0, 404)
    assert "there is no task 'topic'" in late.json()["error"]
    assert close(mood.json(), expected)


def test_the_only_task_of_a_folder_takes_the_name_of_the_folder(place: Path, app: Any) -> None:
    request = {**TOPIC, "task": "renamed"}
    added, found = call(app, admin("PUT", "renamed"), ("POST", "/predict", {"json": request}))
    assert added.json()["name"] == "renamed"
    assert close(found.json(), {**alone(place / "root" / "renamed", TOPIC), "task": "renamed"})


def test_one_of_several_tasks_of_a_folder(place: Path, app: Any) -> None:
    request = {"task": "tone", "text": "she is here."}
    added, found, tasks = call(app, admin("PUT", "tone"), ("POST", "/predict", {"json": request}), ("GET", "/tasks"))
    assert added.status_code == 201
    assert close(found.json(), alone(place / "root" / "tone", request))
    assert list(tasks.json()) == ["mood", "tone"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stranger", "was saved on the base model"),
        ("trained", "has base weights of its own"),
        ("two", "is not a task of"),
        ("damaged", "is damaged"),
        ("incomplete", "is not there"),
    ],
)
def test_a_folder_that_does_not_fit_changes_nothing(place: Path, app: Any, name: str, message: str) -> None:
    refused, tasks, found, added = call(
        app, admin("PUT", name), ("GET", "/tasks"), ("POST", "/predict", {"json": MOOD}), admin("PUT", "topic")
    )
    assert refused.status_code == 422
    assert message in refused.json()["error"]
    assert list(tasks.json()) == ["mood"]
    assert close(found.json(), alone(place / "served", MOOD))
    assert added.status_code == 201


def test_the_last_task_can_be_removed_and_another_one_added(place: Path, app: Any) -> None:
    removed, none, health, added, found = call(
        app, admin("DELETE", "mood"), ("POST", "/predict", {"json": MOOD}), ("GET", "/health"), admin("PUT", "topic"),
        ("POST", "/predict", {"json": TOPIC}),
    )  # fmt: skip
    assert (removed.status_code, none.status_code, added.status_code) == (204, 422, 201)
    assert health.json()["tasks"] == 0
    assert close(found.json(), alone(place / "root" / "topic", TOPIC))


def test_adding_one_task_twice_at_once_adds_it_once(app: Any) -> None:
    found = call(app, *[admin("PUT", "topic")] * 3, ("POST", "/predict", {"json": MOOD}), together=True)
    assert sorted(one.status_code for one in found[:3]) == [201, 409, 409]
    assert found[3].status_code == 200
