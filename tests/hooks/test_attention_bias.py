"""Which self-attentions take an additive term."""

from __future__ import annotations

import pytest
import torch
import transformers

from pal_adapters.blocks.signatures import positions_of
from pal_adapters.blocks.sites import find_blocks, resolve
from pal_adapters.hooks.attention_bias import refusal
from tests.zoo import V5

pytestmark = pytest.mark.skipif(not V5, reason="transformers 4.57 has no such models, or other ones")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("ParakeetEncoder", {}, "chooses by its mask which tokens it sees"),
        ("NemotronAsrStreamingEncoder", {}, "chooses by its mask which tokens it sees"),
        ("MLCDVisionModel", {"num_key_value_groups": 2}, "repeats its values too often"),
        ("MLCDVisionModel", {}, None),
        ("LlamaModel", {"num_key_value_heads": 2}, None),
        ("Qwen3NextModel", {"layer_types": ["full_attention"] * 2}, None),  # whose queries hold gates too
    ],
)
def test_masks_that_mean_something_else_are_rejected(
    name: str, changes: dict[str, object], reason: str | None
) -> None:
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class(num_hidden_layers=2, **changes))
    block = find_blocks(model)[0]
    attention = resolve(block.module, block.sites.attention)
    assert attention is not None
    found = refusal(attention, block.sites, positions_of(attention), "sdpa")
    assert found is None if reason is None else reason in str(found)
