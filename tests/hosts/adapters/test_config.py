"""Our configs, used as the host's own tests use its configs."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from adapters import ADAPTER_CONFIG_MAP
from adapters.configuration.adapter_fusion_config import ADAPTERFUSION_CONFIG_MAP

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
    one, two = (ADAPTERFUSION_CONFIG_MAP[name] for name in ("scalearn++", "scalearn_pp"))
    assert one is not two
    assert one.to_dict() == two.to_dict()
