"""The tests of the methods, and their records: `RECORDS`, found in the folders beside this file."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.record import Record

RECORDS: dict[str, Record] = {}
for _folder in sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg):
    if (Path(__path__[0]) / _folder / "record.py").is_file():
        for _record in importlib.import_module(f"{__name__}.{_folder}.record").RECORDS:
            RECORDS[_record.name] = _record


def makers(
    host: str, having: Callable[[Record], bool] = lambda record: True, *, dropout: bool = True
) -> dict[str, Callable[..., Any]]:
    """By method, what makes a small config of a host; with `dropout=False` none that drops out."""
    made = {}
    for name in names(host, having):
        off = {} if dropout or not RECORDS[name].has_dropout else {"dropout": 0.0}
        made[name] = functools.partial(RECORDS[name].config, host, **off)
    return made


def names(host: str, having: Callable[[Record], bool] = lambda record: True) -> list[str]:
    """The methods of a host that act block by block, in the order of their folders."""
    return [
        name
        for name, record in RECORDS.items()
        if record.config_class(host) is not None and not record.method.network and having(record)
    ]
