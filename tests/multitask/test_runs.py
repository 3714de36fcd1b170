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

JOB = str(Path(__file__).with_name("job.py"))
ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture
def start(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", ROOT, prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(output: Path, processes: int = 1, **settings: Any) -> subprocess.CompletedProcess[str]:
        output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
            settings["ddp_backend"] = "gloo"
        command += [JOB, tiny_encoder, str(output), json.dumps(settings)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)

    return run


def result(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "result.pt", weights_only=False)


def test_killed_run_goes_on_to_the_same_end(start: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"host": HOSTS[-1], "base": True, "sampling": "annealed", "max_steps": 7}
    settings |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    whole = start(tmp_path / "whole", **settings)
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = start(tmp_path / "killed", kill=5, **settings)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.pt").exists()
    resumed = start(tmp_path / "killed", resume=True, **settings)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    expected, got = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert got["losses"] == expected["losses"]
    assert [entry["step"] for entry in got["losses"]] == list(range(1, 8))
    for name, value in expected["parameters"].items():
        assert torch.equal(value, got["parameters"][name]), name


@pytest.mark.parametrize(("host", "mixed"), [(HOSTS[-1], False), (HOSTS[min(1, len(HOSTS) - 1)], True)])
def test_two_processes_equal_one_with_the_doubled_batch(start: Any, tmp_path: Path, host: str, mixed: bool) -> None:
    settings: dict[str, Any] = {"host": host, "names": ["rte", "stsb", "ner"], "mixed_batches": mixed, "max_steps": 5}
    settings |= {"dropout": False, "optim": "sgd", "learning_rate": 0.05, "base": True, "max_grad_norm": 1.0}
    settings |= {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    two = start(tmp_path / "two", 2, per_device_train_batch_size=3, **settings)
    assert two.returncode == 0, two.stderr[-3000:]
    one = start(tmp_path / "one", per_device_train_batch_size=6, **settings)
    assert one.returncode == 0, one.stderr[-3000:]
    expected, got = result(tmp_path / "one"), result(tmp_path / "two")
    assert len(got["losses"]) == len(expected["losses"])
    for left, right in zip(got["losses"], expected["losses"], strict=True):
        assert left == pytest.approx(right, abs=2e-4)
    moved = 0
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(value, got["parameters"][name], atol=2e-5, rtol=1e-4, msg=name)
        moved += 1
    assert moved
    assert (tmp_path / "two" / "checkpoint-5" / "task_heads.json").is_file()
