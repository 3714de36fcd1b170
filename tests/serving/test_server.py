"""The service as a process: SIGTERM during calls."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httpx")

import httpx

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import sys
from pal_adapters.serving import create_app, serve, server
from tests.serving.fake import FakePredictor

class Held(FakePredictor):
    def __call__(self, requests):
        print("started", flush=True)
        sys.stdin.readline()
        return super().__call__(requests)

server.GRACE_SECONDS = int(sys.argv[1])
serve(create_app(Held()), port=0)
"""


class Served:
    """The service in a process, with a call in progress."""

    def __init__(self, process: Any) -> None:
        self.process, self.log = process, [""]
        self.found: list[Any] = []

    def read_log_until(self, pattern: str) -> re.Match[str]:
        while (match := re.search(pattern, self.log[-1])) is None:
            self.log.append(self.process.stderr.readline())
            assert self.log[-1], "".join(self.log)
        return match

    def start_call(self) -> threading.Thread:
        address = self.read_log_until(r"http://\S+")[0]
        body = {"task": "sentiment", "sentence": "fine film"}
        caller = threading.Thread(
            target=lambda: self.found.append(
                httpx.post(f"{address}/predict", json=body, timeout=None, trust_env=False)
            )
        )
        caller.start()
        assert self.process.stdout.readline() == "started\n"
        return caller

    def go_on(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def check_end(self) -> None:
        assert self.process.wait() in (0, -signal.SIGTERM)
        rest = self.process.stderr.read()
        assert "Traceback" not in "".join([*self.log, rest])
        assert "Application shutdown complete" in rest


@contextmanager
def served(grace_seconds: int) -> Iterator[Served]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(grace_seconds)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Served(process)
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_calls_in_progress_end() -> None:
    with served(grace_seconds=30) as service:
        caller = service.start_call()
        service.process.send_signal(signal.SIGTERM)
        service.read_log_until("Shutting down")
        service.go_on()
        caller.join()
        assert service.found[0].status_code == 200
        assert json.loads(service.found[0].content)["label"] == "FINE FILM"
        service.check_end()


def test_calls_that_take_longer_are_told_to_try_again() -> None:
    with served(grace_seconds=0) as service:
        caller = service.start_call()
        service.process.send_signal(signal.SIGTERM)
        caller.join()
        assert service.found[0].status_code == 503
        assert service.found[0].json() == {"error": "the service is stopping"}
        assert service.found[0].headers["Retry-After"] == "1"
        service.go_on()
        service.check_end()
