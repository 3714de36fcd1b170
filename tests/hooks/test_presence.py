"""Blocks that are cut off or replaced after an adapter was added."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from peft import get_peft_model
from torch import nn

from pal_adapters import CAMTLPeftConfig
from pal_adapters.blocks.sites import find_blocks
from pal_adapters.hooks.presence import Presence
from tests import zoo
from tests.families.checks import METHODS
from tests.zoo import HOST_WARNINGS

pytestmark = HOST_WARNINGS
TASKS = {"task_ids": ["a", "b", "a"]}


def _cut(base: Any) -> None:
    base.model.layers = base.model.layers[:1]


def _replace(base: Any) -> None:
    base.model.layers[1] = zoo.BY_NAME["llama"].build().model.layers[1]


@pytest.mark.parametrize("change", [_cut, _replace])
@pytest.mark.parametrize("options", [{"bottleneck": "top"}, {"bottleneck": "stream"}, {"train_base": False}])
def test_a_network_leaves_with_its_last_block(change: Any, options: dict[str, Any]) -> None:
    host = zoo.BY_NAME["llama"]
    model = get_peft_model(host.build(), CAMTLPeftConfig(tasks=["a", "b"], **options)).eval()
    zoo.randomise(nn.ParameterList([p for p in model.parameters() if p.requires_grad]), seed=11)
    plain, inputs = host.build(), host.inputs()
    with torch.no_grad():
        assert not torch.equal(model(**inputs, **TASKS).logits, plain(**inputs).logits)
        change(model.get_base_model())
        change(plain)
        with model.disable_adapter(), pytest.warns(UserWarning, match=r"model.layers.1 was cut off or replaced"):
            assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("change", [_cut, _replace])
def test_a_module_behind_the_stack_leaves_with_its_block(change: Any) -> None:
    host = zoo.BY_NAME["llama"]
    model = get_peft_model(host.build(), METHODS["top attention"]()).eval()
    plain, inputs = host.build(), host.inputs()
    change(model.get_base_model())
    change(plain)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"model.layers.1 was cut off or replaced"):
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_what_is_put_around_a_block_keeps_it() -> None:
    model = zoo.BY_NAME["llama"].build()
    block = find_blocks(model)[1]
    presence = Presence(model, block)
    assert presence.holds()
    model.model.layers[1] = nn.Sequential(block.module)
    assert presence.holds()
    model.model.layers[1] = nn.Identity()
    assert not presence.holds()
