"""The service on Ray with two replicas. Not in the default run: `pip install -e ".[ray]"`, then `pytest -m ray`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pal_adapters.multitask import HeadConfig, Predictor, TaskHeads
from pal_adapters.multitask.model.task_description import TaskDescription

from .conftest import ROOT, load_script

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]  # ray's own warnings


@pytest.fixture(scope="module")
def folder(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModel, AutoTokenizer

    path = tmp_path_factory.mktemp("served")
    model = TaskHeads(AutoModel.from_pretrained(tiny_encoder))
    for name in ("mood", "topic"):
        model.add(name, HeadConfig("single_label", 2))
    described = [TaskDescription(name, "single_label", ("text",), ("no", "yes")) for name in ("mood", "topic")]
    model.save_pretrained(path, processing_class=AutoTokenizer.from_pretrained(tiny_encoder), tasks=described)
    return path


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    script = load_script(ROOT / "examples" / "serve_ray.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples"), *sys.path])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    script.start(str(folder), script.RayOptions(replicas=2, port=port), blocking=False)
    yield f"http://127.0.0.1:{port}/predict"
    script.serve.shutdown()
    ray.shutdown()


def test_two_replicas_answer_mixed_calls(address: str, folder: Path) -> None:
    import httpx

    requests = [
        {"task": task, "text": text} for text in ("a film", "a book that is long") for task in ("mood", "topic")
    ]
    expected = [answer.to_dict() for answer in Predictor.from_pretrained(folder)(requests)]

    def check(found: Any, wanted: Any) -> None:
        assert found["task"] == wanted["task"]
        assert found["scores"] == pytest.approx(wanted["scores"], abs=1e-5)

    with httpx.Client(timeout=120, trust_env=False) as client:
        for _ in range(4):
            for found, wanted in zip(client.post(address, json=requests).json(), expected, strict=True):
                check(found, wanted)
        check(client.post(address, json=requests[0]).json(), expected[0])
        wrong = client.post(address, json=[requests[0], {"task": "nope", "text": "x"}])
        assert (wrong.status_code, wrong.json()["index"]) == (422, 1)
        assert "there is no task 'nope'" in wrong.json()["error"]
        assert client.post(address, content=b"{").status_code == 400
