"""Our configs, used as the host's own tests use its configs."""

from __future__ import annotations

import json
import pathlib
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from adapters import ADAPTER_CONFIG_MAP, AdapterFusionConfig

import pal_adapters

OURS = {name: c for name, c in ADAPTER_CONFIG_MAP.items() if type(c).__module__.startswith("pal_adapters.")}


@pytest.mark.parametrize("name", OURS)
def test_arguments_of_other_methods_cannot_be_set(name: str) -> None:
    """The host's configs accept attributes of any name; those without an effect are rejected."""
    config: Any = OURS[name]
    for argument in {"r", "prompt_length", "prefix_length"} - set(config.__dataclass_fields__):
        with pytest.raises(FrozenInstanceError, match=f"{argument} is not an argument of {type(config).__name__}"):
            setattr(config, argument, 3)
        assert not hasattr(config, argument)


def test_other_attributes_can() -> None:
    config: Any = pal_adapters.PALConfig()
    config.note = "mine"
    assert config.note == "mine"


def test_two_names_of_a_fusion_are_two_objects() -> None:
    one, two, again = (AdapterFusionConfig.load(name) for name in ("scalearn++", "scalearn_pp", "scalearn_pp"))
    assert len({id(config) for config in (one, two, again)}) == 3
    assert one.to_dict() == two.to_dict() == again.to_dict()


def test_loading_a_fusion_config(tmp_path: pathlib.Path) -> None:
    """By name, with options, from a dict and from a file; the host's own as before."""
    expected = pal_adapters.ScaLearnConfig(variant="scalearn_pp", init_scale=1.0)
    path = tmp_path / "adapter_fusion_config.json"
    path.write_text(json.dumps({"config": expected.to_dict(), "name": "a,b"}))
    for config in (expected, expected.to_dict(), str(path), "scalearn_pp[init_scale=1.0]"):
        assert AdapterFusionConfig.load(config) == expected
    assert AdapterFusionConfig.load("scalearn++", init_scale=1.0) == expected
    with pytest.raises(pal_adapters.ConfigError, match="temperature=True is not allowed"):
        AdapterFusionConfig.load("scalearn", temperature=True)
    static = AdapterFusionConfig.load("static", temperature=True)
    assert type(static) is AdapterFusionConfig
    assert (static.temperature, static.value) == (True, False)
