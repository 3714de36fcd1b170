"""Runs in separate processes: killed and resumed, and two processes that share one run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import HOSTS
from job import run

from pal_adapters.multitask import TaskHeads
from tests.processes import python

JOB = str(Path(__file__).resolve().parents[1] / "job.py")
ROOT = str(Path(__file__).resolve().parents[3])


@pytest.fixture
def start(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", ROOT, prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(output: Path, *settings: dict[str, Any], processes: int = 1) -> subprocess.CompletedProcess[str]:
        command = [JOB, tiny_encoder, str(output), json.dumps(settings)]
        if processes == 1:
            return python(*command)
        # Standalone runs find a port that no other run on the machine can take in between.
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command]
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)

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
    common |= {"evaluate": [1, 3, 8]}  # batch sizes; the five examples of a task do not divide evenly
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
        assert set(expected["exact"]) == {"eval_rte_loss", "eval_stsb_loss", "eval_ner_loss"}
        for found in (*got["evaluations"], *expected["evaluations"]):
            for name, value in expected["exact"].items():
                assert found[name] == pytest.approx(value, rel=1e-3), name
        assert (tmp_path / "two" / str(number) / "checkpoint-5" / "task_heads.json").is_file()


def test_sharded_parameters(start: Any, tiny_encoder: str, tmp_path: Path) -> None:
    host = HOSTS[min(1, len(HOSTS) - 1)]
    common: dict[str, Any] = {"host": host, "names": ["rte", "stsb", "ner"], "base": True, "max_steps": 4}
    common |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    # The loss falls, so the "best" model is not the last.
    common |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    common |= {"gradient_accumulation_steps": 2, "max_tensor_grad_norm": 1.0}
    sgd: dict[str, Any] = {**common, "dropout": False, "optim": "sgd", "learning_rate": 0.05}
    # In PEFT the first block holds what all share, so the model is one piece.
    layers = {"transformer_layer_cls_to_wrap": ["BertLayer"]} if host == "adapters" else {}
    sharded = {"per_device_train_batch_size": 3, "fsdp": layers}
    first = str(tmp_path / "1" / "checkpoint-2")
    adam = {**common, **sharded, "adam_bias_correction": False}
    half = {**sgd, "bf16": True, "max_steps": 2, "save_strategy": "no", "load_best_model_at_end": False}
    two = start(tmp_path, {**sgd, **sharded}, adam, {**adam, "resume": first}, {**half, **sharded}, processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    got, whole, resumed, rough = (torch.load(tmp_path / str(number) / "result.pt") for number in range(4))
    assert got["sharded"] == ["DTensor"]

    expected = run(tiny_encoder, tmp_path / "one", {**sgd, "per_device_train_batch_size": 6})
    for left, right in zip(got["losses"], expected["losses"], strict=True):
        assert left == pytest.approx(right, abs=2e-4)
    saved = {step: TaskHeads.from_pretrained(tmp_path / "0" / f"checkpoint-{step}") for step in (2, 4)}
    alone = {step: TaskHeads.from_pretrained(tmp_path / "one" / f"checkpoint-{step}") for step in (2, 4)}
    for step, model in alone.items():
        values = dict(saved[step].named_parameters())
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, values[name], atol=2e-5, rtol=1e-4, msg=name)
    for name, value in saved[2].named_parameters():
        assert torch.equal(value, got["parameters"][name]), name  # the best one was restored
    assert any(not torch.equal(value, got["parameters"][name]) for name, value in saved[4].named_parameters())

    assert resumed["losses"] == whole["losses"]
    left, right = (TaskHeads.from_pretrained(tmp_path / number / "checkpoint-4") for number in "12")
    for (name, value), other in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(value, other), name

    expected = run(tiny_encoder, tmp_path / "half", {**half, "per_device_train_batch_size": 6})
    assert expected["losses"] != got["losses"][:2]
    for one, other in zip(rough["losses"], expected["losses"], strict=True):
        assert one == pytest.approx(other, abs=1e-3)  # losses rounded to bf16 are off by more
