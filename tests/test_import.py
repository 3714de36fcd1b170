"""Importing the package with either host, both or neither."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import pal_adapters
from pal_adapters.errors import MissingHostError, PalAdaptersError
from tests.processes import python


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {blocked!r}:
                raise ModuleNotFoundError(name)
            return None

    sys.meta_path.insert(0, Blocker())
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in {blocked!r} else find(name, *a)
"""


@pytest.mark.parametrize("blocked", [("adapters",), ("peft",), ("adapters", "peft")])
def test_import_works_without_hosts_and_names_say_what_to_install(blocked: tuple[str, ...]) -> None:
    out = run(
        textwrap.dedent(BLOCK.format(blocked=blocked))
        + textwrap.dedent("""
        import pal_adapters
        from pal_adapters import *
        for name in ("PALConfig", "PALPeftConfig"):
            try:
                getattr(pal_adapters, name)
                print(name, "there")
            except ImportError as error:
                print(name, error)
        """)
    )
    lines = dict(line.split(" ", 1) for line in out.splitlines())
    for host, name in (("adapters", "PALConfig"), ("peft", "PALPeftConfig")):
        if host in blocked:
            assert f"pip install -e '.[{host}]'" in lines[name]


def test_importing_twice_registers_once() -> None:
    code = "import importlib, pal_adapters; importlib.reload(pal_adapters); pal_adapters.PALPeftConfig"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        pal_adapters.no_such_name  # noqa: B018


def test_missing_host_error_is_an_import_error_of_ours() -> None:
    assert issubclass(MissingHostError, ImportError)
    assert issubclass(MissingHostError, PalAdaptersError)


def test_every_public_name_has_a_docstring() -> None:
    for name in pal_adapters.__all__:
        assert (getattr(pal_adapters, name).__doc__ or "").strip(), name
