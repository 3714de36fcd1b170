"""The arrows between the package's folders: read from the imports, also those inside functions and TYPE_CHECKING."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "pal_adapters"
ORDER = ["nn", "blocks", "hooks", "hosts", "methods", "fusion", "multitask", "serving", "cli"]
"""Each folder may import from itself and from those before it."""


def _imports(module: str, path: Path, modules: set[str]) -> Iterator[str]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            front = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*front, *filter(None, [node.module])])
            for alias in node.names:
                yield name if (name := f"{source}.{alias.name}") in modules else source


def _graph() -> dict[str, set[str]]:
    names = {path: ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)) for path in ROOT.rglob("*.py")}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    modules = set(names.values())
    return {name: set(_imports(name, path, modules)) & modules - {name} for path, name in names.items()}


GRAPH = _graph()
EDGES = [(module, target) for module, targets in GRAPH.items() for target in targets]


def _folder(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def _short(module: str) -> str:
    return module.removeprefix("pal_adapters.")


def _reachable(start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = GRAPH[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _upward() -> set[str]:
    return {
        f"{_short(a)} -> {_short(b)}"
        for a, b in EDGES
        if _folder(a) in ORDER
        and (
            (b == ROOT.name and _folder(a) != "cli")
            or (_folder(b) in ORDER and ORDER.index(_folder(b)) > ORDER.index(_folder(a)))
        )
    }


def _between_methods() -> set[str]:
    """A method imports no other; `methods/shared.py` and `methods/released.py` hold what several use."""
    inside = [(a.split("."), b.split(".")) for a, b in EDGES if _folder(a) == _folder(b) == "methods"]
    return {
        f"{'.'.join(a[1:])} -> {'.'.join(b[1:])}"
        for a, b in inside
        if len(b) < 3 or (a[2:3] != b[2:3] and b[2] not in ("shared", "released"))
    }


def _circles() -> set[str]:
    reach = {module: _reachable(module) for module in GRAPH}
    circles = {frozenset(b for b in reach[a] if a in reach[b]) for a in GRAPH if a in reach[a]}
    return {" ".join(sorted(map(_short, circle))) for circle in circles}


FOUND = {"upward": _upward, "between methods": _between_methods, "in a circle": _circles}


@pytest.mark.parametrize("rule", FOUND)
def test_no_import_goes(rule: str) -> None:
    assert FOUND[rule]() == set()


def test_the_graph_is_read() -> None:
    assert "pal_adapters.hosts.which" in GRAPH["pal_adapters.fusion.arguments"]
    assert "pal_adapters.fusion.peft.penalty" in GRAPH["pal_adapters.fusion.penalty"], "imports inside functions too"
    assert len(GRAPH) > 100
