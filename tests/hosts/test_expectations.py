"""Errors about hosts that are not as expected, and warnings about newer ones."""

from __future__ import annotations

import warnings

import pytest

from pal_adapters import MissingHostError, UntestedVersionWarning
from pal_adapters.hosts import expectations
from pal_adapters.hosts.expectations import Touch, check_host, warn_untested


class Host:
    limit: int

    def add(self, name: str, more: int = 0) -> None: ...


HOST = f"{__name__}:Host"
ADD = f"{HOST}.add"


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    installed = {"peft": "0.21.2", "transformers": "5.24.0", "adapters": "1.3.0"}
    monkeypatch.setattr(expectations, "version", installed.__getitem__)
    monkeypatch.setattr(expectations, "_warned", set())
    return installed


@pytest.mark.parametrize(
    "touch",
    [
        Touch(HOST, None, "x"),
        Touch(HOST, ("add",), "x"),
        Touch(HOST, None, "x", source="limit"),
        Touch(ADD, ("self", "name", "more"), "x"),
        Touch(ADD, ("self", "..."), "x"),
        Touch(ADD, ("...", "more", "self"), "x"),
    ],
)
def test_what_holds(touch: Touch) -> None:
    check_host("peft", [touch])


@pytest.mark.parametrize(
    ("touch", "fault"),
    [
        (Touch(ADD, ("self", "name", "most"), "x"), r"Host\.add takes \(self, name, more\), not \(self, name, most\)"),
        (Touch(ADD, ("self", "name"), "x"), r"Host\.add takes \(self, name, more\), not \(self, name\)"),
        (Touch(ADD, ("name", "..."), "x"), r"Host\.add takes .*, not \(name, \.\.\.\)"),
        (Touch(ADD, ("...", "adapter_name"), "x"), r"Host\.add takes .*, not \(\.\.\., adapter_name\)"),
        (Touch(f"{HOST}.remove", None, "x"), r"Host\.remove does not exist"),
        (Touch("no_such_library:Host", None, "x"), r"Host does not exist"),
        (Touch(HOST, ("add", "remove", "drop"), "x"), r"Host has no remove, drop"),
        (Touch(HOST, None, "x", source="subtract"), r"Host \(subtract\) has changed"),
    ],
)
def test_what_does_not(touch: Touch, fault: str) -> None:
    with pytest.raises(
        MissingHostError,
        match=rf"peft 0\.21\.2 does not work .*: {fault} \(needed: x\)\. .*tested version, 0\.21\.0 to 0\.21\.x",
    ):
        check_host("peft", [touch])


def test_too_old(versions: dict[str, str]) -> None:
    versions["peft"] = "0.20.4"
    with pytest.raises(MissingHostError, match=r"peft 0\.20\.4 is not supported: install 'peft>=0\.21\.0'"):
        check_host("peft", [])


@pytest.mark.parametrize(
    ("library", "installed", "warned"),
    [
        ("peft", "0.21.9", False),
        ("peft", "0.22.0", True),
        ("peft", "0.21.3.dev0", False),
        ("transformers", "4.58.0", False),
        ("transformers", "5.24.3", False),
        ("transformers", "5.25.0", True),
        ("transformers", "6.0.0", True),
        ("adapters", "1.3.1", False),
        ("adapters", "1.4.0", True),
    ],
)
def test_newer_versions_are_stated_once(versions: dict[str, str], library: str, installed: str, warned: bool) -> None:
    versions[library] = installed
    for first in (True, False):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warn_untested("peft", "transformers", "adapters")
        assert [w.category for w in seen] == [UntestedVersionWarning] * (warned and first)
        assert all(f"{library} " in str(w.message) and installed in str(w.message) for w in seen)
