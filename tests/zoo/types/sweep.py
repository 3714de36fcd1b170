"""Tries every method on every type, each type in a process of its own, and keeps the verdicts."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import time
from dataclasses import asdict
from typing import Any

import peft
import transformers
from torch import nn

from pal_adapters.blocks.survey import survey

from .build import NotBuilt, build, model_types
from .plain import Plain
from .verdict import METHODS, verdict

RESULTS = pathlib.Path(__file__).parent / "results"
VERSIONS = {"transformers": transformers.__version__, "peft": peft.__version__, "types": len(model_types())}
_SECONDS, _BYTES = 30, 14 << 30  # of a type's process
Row = dict[str, Any]


def _attends(model: nn.Module) -> bool:
    """Whether a list of the model has blocks with an attention, by the names of the classes alone.

    RWKV's modules are named so, although each token reads a state and not other tokens.
    """
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    names = {type(part).__name__ for stack in lists for part in stack.modules()}
    return any(("Attention" in name or "Attn" in name) and not name.startswith("Rwkv") for name in names)


def row_of(kind: str, methods: list[str]) -> Row:
    """What is known about a type after trying the methods on it."""
    try:
        built = build(kind)
    except NotBuilt as reason:
        return {"type": kind, "not_built": str(reason)[-500:]}
    plain = Plain(built)
    stacks = {stack.path for stack in survey(built.model)}
    return {
        "type": kind,
        "class": type(built.model).__name__,
        "inputs": sorted(built.inputs),
        "attends": _attends(built.model),
        "stacks": len(stacks),
        "verdicts": {name: {k: v for k, v in asdict(verdict(plain, name)).items() if v} for name in methods},
    }


def _alone(kind: str, methods: list[str]) -> Row:
    """`row_of` in another process, which may run out of time or memory or crash."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(reader)
            resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
            os.write(writer, json.dumps(row_of(kind, methods)).encode())
        except BaseException as error:  # the parent learns of it from the row
            os.write(writer, json.dumps({"type": kind, "not_built": f"{type(error).__name__}: {error}"}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(process, 0)
    return json.loads(text) if text else {"type": kind, "not_built": "its process ended without a result"}


def _file(kind: str) -> pathlib.Path:
    """Where the verdicts of a type stand: in a file by the first letter of its name."""
    return RESULTS / f"{kind[0]}.json"


def read(folder: pathlib.Path = RESULTS) -> dict[str, Row]:
    """The rows of all types that were tried with the versions at hand, by type."""
    rows: dict[str, Row] = {}
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        rows |= {row["type"]: row for row in content["rows"]}
    return rows


def _write(row: Row) -> None:
    file = _file(row["type"])
    old = json.loads(file.read_text()) if file.exists() else {"versions": VERSIONS, "rows": []}
    kept = [other for other in old["rows"] if other["type"] != row["type"]] if old["versions"] == VERSIONS else []
    rows = ",\n".join(json.dumps(r) for r in sorted([*kept, row], key=lambda r: str(r["type"])))
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'{{"versions": {json.dumps(VERSIONS)}, "rows": [\n{rows}\n]}}\n')


def sweep(number: int, parts: int, types: list[str] | None = None, *, again: bool = False) -> None:
    """Try the types of a part that have no verdicts yet."""
    done = set() if again else set(read())
    for kind in types or model_types()[number - 1 :: parts]:
        if kind in done:
            continue
        start = time.monotonic()
        row = _alone(kind, list(METHODS))
        _write(row)
        kinds = [f"{name}: {found['kind']}" for name, found in row.get("verdicts", {}).items()]
        print(f"{kind}: {', '.join(kinds) or row['not_built']} ({time.monotonic() - start:.1f} s)", flush=True)
