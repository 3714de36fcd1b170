"""The tiny models of the `adapters` host."""

from __future__ import annotations

from tests.hosts.adapters.conftest import base_path, batch, bert, plain_bert, python

__all__ = ["base_path", "batch", "bert", "plain_bert", "python"]
