"""The service as a process: SIGTERM during a call."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httpx")

import httpx

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import sys
from pal_adapters.serving import create_app, serve
from tests.serving.fake import FakePredictor

class Held(FakePredictor):
    def __call__(self, requests):
        print("started", flush=True)
        sys.stdin.readline()
        return super().__call__(requests)

serve(create_app(Held()), port=0)
"""


def test_sigterm_lets_calls_in_progress_end() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        log: list[str] = []
        address = None
        while address is None:
            log.append(process.stderr.readline())
            assert log[-1], "".join(log)
            address = re.search(r"http://\S+", log[-1])
        found: list[Any] = []
        body = {"task": "sentiment", "sentence": "fine film"}
        caller = threading.Thread(
            target=lambda: found.append(httpx.post(f"{address[0]}/predict", json=body, timeout=None, trust_env=False))
        )
        caller.start()
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        while "Shutting down" not in log[-1]:
            log.append(process.stderr.readline())
            assert log[-1], "".join(log)
        process.stdin.write("go\n")
        process.stdin.flush()
        caller.join()
        assert found[0].status_code == 200
        assert json.loads(found[0].content)["label"] == "FINE FILM"
        assert process.wait() in (0, -signal.SIGTERM)
        rest = process.stderr.read()
        assert "Traceback" not in rest
        assert "Application shutdown complete" in rest
    finally:
        process.kill()
        process.communicate()
