"""PEFT's own warnings, as in the tests of the host."""

from __future__ import annotations

import pathlib

import pytest

from tests.hosts.peft.conftest import allow_host_warnings, quiet

__all__ = ["quiet"]

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    allow_host_warnings(items, HERE)
