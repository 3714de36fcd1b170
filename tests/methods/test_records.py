"""Every method has a record, and bindings that register nothing are rejected."""

from __future__ import annotations

import importlib
import pickle
import types
from dataclasses import fields
from typing import Any

import pytest

import pal_adapters
from pal_adapters import methods
from pal_adapters.checks import check_of
from pal_adapters.errors import ConfigError, PalAdaptersError
from pal_adapters.hosts.method import REGISTERED
from tests.methods import RECORDS

PAIRS = [(name, host) for host, registered in REGISTERED.items() for name in registered]


def test_every_method_has_a_record() -> None:
    registered = {name for by_name in REGISTERED.values() for name in by_name}
    assert registered, "no host is installed"
    assert registered == {name for name in RECORDS if any(name in by_name for by_name in REGISTERED.values())}


def test_every_folder_registers_for_some_host() -> None:
    modules = {cls.__module__.rpartition(".")[0] for by_name in REGISTERED.values() for cls in by_name.values()}
    for folder in methods.folders():
        package = importlib.import_module(f"pal_adapters.methods.{folder}")
        assert package.__name__ in modules
        assert (package.__doc__ or "").strip(), "says what lives there"


@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_what_a_record_says_fits_the_method(name: str, host: str) -> None:
    record, config_class = RECORDS[name], RECORDS[name].config_class(host)
    assert issubclass(config_class, record.options_class)
    assert config_class.host == host
    assert config_class.__doc__ and not config_class.__doc__.startswith(f"{config_class.__name__}(")  # noqa: PT018
    defaults = {f.name: getattr(record.options_class(), f.name) for f in fields(record.options_class)}
    assert set(record.changes) <= set(defaults)
    assert all(defaults[option] != value for option, value in record.changes.items())
    config = record.config(host, **record.changes)
    assert all(getattr(config, option) == value for option, value in record.changes.items())
    if not record.method.network and name != "houlsby":
        unit = record.unit(24)
        assert record.shares == unit.shares
        assert record.attends == record.method.attends == ("mask" in unit.needs)
        assert record.at_top == (unit.sites == ("stack_output",))


@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_every_field_has_a_check_and_a_help(name: str, host: str) -> None:
    config_class = RECORDS[name].config_class(host)
    for f in fields(config_class):
        assert check_of(config_class, f.name) is not None, f.name
    for f in fields(RECORDS[name].options_class):
        assert f.metadata["help"].endswith("."), f.name
        assert f"{f.name}:" in (RECORDS[name].options_class.__doc__ or ""), f"{f.name} is not documented"


@pytest.mark.parametrize("host", [host for host, registered in REGISTERED.items() if registered])
def test_a_binding_that_forgets_to_register_is_an_error(host: str) -> None:
    known = RECORDS["pal"].config_class(host)
    binding = types.ModuleType("somewhere.binding")
    binding.__file__ = "somewhere/binding.py"
    with pytest.raises(PalAdaptersError, match=r"somewhere/binding.py defines no config: end it with register"):
        methods.registered_in(binding, host)
    binding.Forgotten = type("Forgotten", (known,), {"__module__": binding.__name__})  # type: ignore[attr-defined]
    with pytest.raises(PalAdaptersError, match=r"defines Forgotten but does not register it.*register\(Forgotten\)"):
        methods.registered_in(binding, host)
    actual = importlib.import_module(known.__module__)
    assert known in methods.registered_in(actual, host).values()


@pytest.mark.parametrize("wrong", [int, "pal", None, object()])
def test_register_method_takes_configs_alone(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="derives from TaskAdapterConfig or TaskPeftConfig"):
        pal_adapters.register_method(wrong)


@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_registering_again_changes_nothing(name: str, host: str) -> None:
    before = {h: dict(by_name) for h, by_name in REGISTERED.items()}
    pal_adapters.register_method(RECORDS[name].config_class(host))
    assert before == REGISTERED


@pytest.mark.parametrize("name", sorted(REGISTERED["peft"]))
def test_peft_classes_can_be_pickled(name: str) -> None:
    """They are found by their module and name, as a model that is saved as a whole needs."""
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_TUNER_MAPPING
    tuner = mapping[name.upper()]
    for cls in (tuner, tuner.tuner_layer_cls):
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert cls.method is RECORDS[name].method
        assert (cls.__doc__ or "").strip()
