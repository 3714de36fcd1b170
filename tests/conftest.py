"""Runs before every test: offline, one thread a worker, seeded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gc
import importlib.util

import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # until all tests are imported

# The suite also runs where one host is missing: the tests of a host are about nothing else.
collect_ignore = [
    f"{folder}/{host}"
    for folder in ("hosts", "fusion")
    for host in ("adapters", "peft")
    if importlib.util.find_spec(host) is None
]
if importlib.util.find_spec("peft") is None:
    collect_ignore.append("clients")


def pytest_collection_finish() -> None:
    """Keeps libraries and tests out of garbage collections, which would take half of the time of all tests."""
    gc.enable()
    _keep_what_stays()


def pytest_runtest_logfinish() -> None:
    """Also what tests have imported and cached since, once this has been walked a number of times."""
    if _full_collections() > _seen + 10:
        _keep_what_stays()


_seen = 0


def _keep_what_stays() -> None:
    global _seen
    gc.collect()
    gc.freeze()
    _seen = _full_collections()


def _full_collections() -> int:
    return gc.get_stats()[2]["collections"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 keeps the precision of the last arguments in the environment, for all that follow."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def transformers_takes_this_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24's own `add_adapter` asks for peft 0.22, which is not released, and works with this one."""
    if importlib.util.find_spec("peft") is not None:
        import peft
        from packaging.version import Version
        from transformers.integrations import peft as integration

        if Version(peft.__version__) < Version(integration.MIN_PEFT_VERSION):
            monkeypatch.setattr(integration, "MIN_PEFT_VERSION", peft.__version__)
