"""Tiny models of the `adapters` host, built once per session and copied for each test."""

from __future__ import annotations

import copy
import pathlib
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertModel

from tests import processes

from .tiny import Run, fresh, tiny_config


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A `BertModel` on disk, 3 blocks of width 24."""
    torch.manual_seed(7)
    model = BertModel(tiny_config())
    for (
        name,
        parameter,
    ) in model.named_parameters():  # not the usual initialisation, so that swapped tensors are noticed
        nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.2)
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def plain_bert(base_path: pathlib.Path) -> nn.Module:
    """That model without adapters, in evaluation mode."""
    return fresh(base_path)


@pytest.fixture
def bert(plain_bert: nn.Module) -> nn.Module:
    """A copy that a test may change."""
    return copy.deepcopy(plain_bert)


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    """Four examples of six tokens, two of them padded."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2, 2:] = 0
    return {"input_ids": torch.randint(0, 40, (4, 6), generator=generator), "attention_mask": mask}


@pytest.fixture
def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> Run:
    """The output of the module's `model` with a setup."""

    def run(setup: Any, **more: Any) -> torch.Tensor:
        model.set_active_adapters(setup)
        with torch.no_grad():
            return model(**batch, **more).last_hidden_state

    return run


@pytest.fixture
def python(tmp_path: pathlib.Path) -> Callable[[str], str]:
    """Runs code in a new process, in the test's folder, and returns what it prints."""

    def run(code: str) -> str:
        done = processes.python("-c", textwrap.dedent(code), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
