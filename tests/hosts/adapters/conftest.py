"""Tiny models of the `adapters` host."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import adapters
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import pal_adapters  # noqa: F401  registers the methods

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
