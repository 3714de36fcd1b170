"""Environment variables that `TrainingArguments` sets for `accelerate`, kept from reaching other runs of the process.

`TrainingArguments.__post_init__` of transformers 4.57 passes `bf16` and `fp16` on through the environment, and both
versions `torch_compile`, but never takes them back: the next run of the process would train in half precision or
compiled too. `Accelerator` reads them, in `Trainer.create_accelerator_and_postprocess`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_PREFIXES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_")


def _present() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}


def _replace(values: Mapping[str, str]) -> None:
    for name in _present():
        del os.environ[name]
    os.environ.update(values)


@contextmanager
def collected_environment(found: dict[str, str]) -> Iterator[None]:
    """A context after which the variables are as before; those that were set in it are added to `found`."""
    before = _present()
    try:
        yield
        found |= _present()
    finally:
        _replace(before)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """A context in which the variables have these values."""
    before = _present()
    _replace(values)
    try:
        yield
    finally:
        _replace(before)
