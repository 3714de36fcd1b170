"""Runs in processes of their own: killed and resumed, and two processes that share one run."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import HOSTS
from job import run

JOB = str(Path(__file__).with_name("job.py"))
ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture
def start(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", ROOT, prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(output: Path, *settings: dict[str, Any], processes: int = 1) -> subprocess.CompletedProcess[str]:
        command = [sys.executable]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
        command += [JOB, tiny_encoder, str(output), json.dumps(settings)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)

    return run


def test_killed_run_goes_on_to_the_same_end(start: Any, tiny_encoder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"host": HOSTS[-1], "base": True, "sampling": "annealed", "max_steps": 7}
    settings |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    killed = start(tmp_path / "killed", {**settings, "kill": 5})
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "killed" / "0" / "result.pt").exists()
    expected = run(tiny_encoder, tmp_path / "whole", dict(settings))
    got = run(tiny_encoder, tmp_path / "killed" / "0", {**settings, "resume": True})
    assert got["losses"] == expected["losses"]
    assert [entry["step"] for entry in got["losses"]] == list(range(1, 8))
    for name, value in expected["parameters"].items():
        assert torch.equal(value, got["parameters"][name]), name


def test_two_processes_equal_one_with_the_doubled_batch(start: Any, tiny_encoder: str, tmp_path: Path) -> None:
    cases = [(HOSTS[-1], False), (HOSTS[min(1, len(HOSTS) - 1)], True)]
    common: dict[str, Any] = {"names": ["rte", "stsb", "ner"], "max_steps": 5, "dropout": False, "base": True}
    common |= {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2}
    common |= {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    settings = [{**common, "host": host, "mixed_batches": mixed} for host, mixed in cases]
    halves = [{**one, "per_device_train_batch_size": 3, "ddp_backend": "gloo"} for one in settings]
    two = start(tmp_path / "two", *halves, processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    for number, one in enumerate(settings):
        got = torch.load(tmp_path / "two" / str(number) / "result.pt")
        expected = run(tiny_encoder, tmp_path / "one" / str(number), {**one, "per_device_train_batch_size": 6})
        assert len(got["losses"]) == len(expected["losses"]) == 5
        for left, right in zip(got["losses"], expected["losses"], strict=True):
            assert left == pytest.approx(right, abs=2e-4)
        for name, value in expected["parameters"].items():
            torch.testing.assert_close(value, got["parameters"][name], atol=2e-5, rtol=1e-4, msg=name)
        assert (tmp_path / "two" / str(number) / "checkpoint-5" / "task_heads.json").is_file()
