"""Any value in any field of any config ends in a config that can be saved, or in one error that names the field.

`CONFIG_CASES=2000 pytest tests/robustness/test_config_values.py` tries more values.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pal_adapters
from pal_adapters.checks import check_of
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.hosts.method import REGISTERED
from tests.methods import RECORDS

CASES = int(os.environ.get("CONFIG_CASES", "150"))
SOURCES = {"adapters": {"s1": "folder/one", "s2": "folder/two"}}

Maker = Callable[..., Any]
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    f"{host}-{name}": (config_class, dict(RECORDS[name].options))
    for host, registered in REGISTERED.items()
    for name, config_class in registered.items()
}
if REGISTERED["peft"]:
    CONFIGS |= {
        "peft-scalearn": (pal_adapters.ScaLearnPeftConfig, SOURCES),
        "peft-adapter_fusion": (pal_adapters.AdapterFusionPeftConfig, SOURCES),
        "peft-fixed_combination": (pal_adapters.FixedCombinationPeftConfig, SOURCES),
    }
if REGISTERED["adapters"]:
    CONFIGS["adapters-scalearn"] = (pal_adapters.ScaLearnConfig, {})
METHODS = [key for key in CONFIGS if key.partition("-")[2] in RECORDS]

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**9, 10**30, -(10**30), 2**63]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 0.0, 1.0, 0.5]),
    st.text(max_size=8),
    st.sampled_from(["output", "none", "mean", "norm", "pal", "layer", "(", "bert", "True", "SEQ_CLS", "1"]),
)
# Values that trip a check written for strings and numbers: not hashable, not comparable, no truth value.
ODD = [
    b"bytes", {1, 2}, frozenset(), object(), int, len, 1j, np.float32(0.5), np.int64(3), np.zeros(3), np.zeros(1),
    torch.zeros(2), torch.tensor(1), torch.zeros(0), [[1]], [None], [{}], [torch.zeros(2), torch.zeros(2)], ([],),
    {"s1": []}, {"block": [1]}, {"s1": np.zeros(3)}, {1: 2}, {None: None}, {("a",): 1}, Path("x"), range(3), "", [""],
    math.nan, [math.nan], 10**30, [10**30], True, [True],
]  # fmt: skip
values = st.one_of(
    plain,
    st.lists(plain, max_size=4),
    st.tuples(plain, plain),
    st.dictionaries(st.one_of(st.text(max_size=5), st.sampled_from(["block", "norm", "s1", "s2"]), plain), plain,
                    max_size=4),
    st.sampled_from(ODD),
)  # fmt: skip


def outcome(make: Callable[[], Any], field: str) -> Any:
    """The config, or the error, which must be one of ours and name the field."""
    try:
        return make()
    except (ConfigError, UnsupportedError) as error:
        message = str(error)
        assert field in message, message
        assert len(message) < 2000, "a long value is cut"
        return error


def saved(config: Any) -> str:
    """The config as JSON, without numbers that JSON does not have."""
    return json.dumps(config.to_dict(), allow_nan=False, default=sorted)


def check_value(key: str, field: str, value: Any) -> None:
    """One value in one field is an error of ours, or a config that is the same after it was saved."""
    config_class, arguments = CONFIGS[key]
    result = outcome(lambda: config_class(**{**arguments, field: value}), field)
    if isinstance(result, Exception):
        return
    check = check_of(config_class, field)
    assert check is None or check.accepts(value)
    again = config_class(**json.loads(saved(result))) if key.startswith("adapters") else result
    assert saved(again) == saved(result)


@pytest.mark.parametrize("key", CONFIGS)
@settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_value(key: str, data: st.DataObject) -> None:
    check_value(key, data.draw(st.sampled_from([f.name for f in fields(CONFIGS[key][0])])), data.draw(values))


@pytest.mark.parametrize("key", CONFIGS)
def test_odd_values_in_every_field(key: str) -> None:
    for f in fields(CONFIGS[key][0]):
        for value in ODD:
            check_value(key, f.name, value)


@pytest.mark.parametrize("key", CONFIGS)
def test_integers_that_python_does_not_print(key: str) -> None:
    config_class, arguments = CONFIGS[key]
    for f in fields(config_class):
        for value in (10**5000, -(10**5000), [10**5000]):
            result = outcome(lambda: config_class(**{**arguments, f.name: value}), f.name)  # noqa: B023
            assert isinstance(result, ConfigError)


@pytest.mark.parametrize("key", METHODS)
@settings(max_examples=CASES // 5, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_files_and_strings_are_checked_as_the_constructor_does(key: str, data: st.DataObject) -> None:
    config_class, arguments = CONFIGS[key]
    field = data.draw(
        st.sampled_from([f.name for f in fields(config_class) if f.name not in ("architecture", "peft_type")])
    )
    value = data.draw(st.one_of(plain, st.lists(plain, max_size=3)))
    expected = outcome(lambda: config_class(**{**arguments, field: value}), field)
    if key.startswith("peft"):
        from peft import get_peft_config

        stored = {"peft_type": config_class.method.name.upper(), **arguments, field: value}  # type: ignore[attr-defined]
        doors: list[Callable[[], Any]] = [lambda: get_peft_config(dict(stored))]
    else:
        from adapters.configuration import AdapterConfig

        stored = {"architecture": config_class.method.name, **arguments, field: value}  # type: ignore[attr-defined]
        doors = [lambda: AdapterConfig.load(dict(stored))]
        if isinstance(value, (int, type(None))):
            written = ", ".join(f"{name}={given!r}" for name, given in {**arguments, field: value}.items())
            preset = {"ca_mtl": "ca_mtl_base"}.get(config_class.method.name, config_class.method.name)  # type: ignore[attr-defined]
            doors.append(lambda: AdapterConfig.load(f"{preset}[{written}]"))
    for door in doors:
        result = outcome(door, field)
        assert isinstance(result, Exception) == isinstance(expected, Exception)
        if isinstance(expected, Exception):
            assert str(result) == str(expected)


@pytest.mark.parametrize("key", CONFIGS)
def test_every_field_has_a_check(key: str) -> None:
    config_class, _ = CONFIGS[key]
    host_only = {"key", "query", "value", "query_before_ln", "residual_before", "temperature", "value_before_softmax",
                 "value_initialized", "dropout_prob"} if key == "adapters-scalearn" else set()  # fmt: skip
    for f in fields(config_class):
        # What `adapters` takes is more than a check can say; the configs check it in code.
        known = f.name in host_only or f.name == "adapters"
        assert known or check_of(config_class, f.name) is not None, f.name


@pytest.mark.parametrize("key", CONFIGS)
def test_defaults_are_allowed(key: str) -> None:
    config_class, arguments = CONFIGS[key]
    config = config_class(**arguments)
    for f in fields(config_class):
        check = check_of(config_class, f.name)
        assert check is None or check.accepts(getattr(config, f.name)), f.name
