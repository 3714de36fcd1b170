"""Runs before every test: offline, one thread a worker, seeded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import importlib.util

import pytest
import torch

torch.set_num_threads(1)

# The suite also runs where one host is missing: the tests of a host are about nothing else.
collect_ignore = [
    f"{folder}/{host}"
    for folder in ("hosts", "fusion")
    for host in ("adapters", "peft")
    if importlib.util.find_spec(host) is None
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 keeps the precision of the last arguments in the environment, for all that follow."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
