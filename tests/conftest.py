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
collect_ignore = [f"hosts/{host}" for host in ("adapters", "peft") if importlib.util.find_spec(host) is None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
