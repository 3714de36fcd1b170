"""What is said of a model that is reached in part."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("peft")

from peft import get_peft_model

from pal_adapters import HoulsbyPeftConfig, PALPeftConfig, describe_sites
from tests.zoo import BY_NAME, HOST_WARNINGS, HOSTS

pytestmark = HOST_WARNINGS

SIZE: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40,
    "num_hidden_layers": 2,
}  # fmt: skip


def long_t5() -> Any:
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return transformers.LongT5Model(transformers.LongT5Config(vocab_size=40, **sizes))


def test_stacks_of_unknown_structure_are_named_once_when_a_method_is_added() -> None:
    with pytest.warns(UserWarning, match="only a part of LongT5Model is adapted") as seen:
        get_peft_model(long_t5(), PALPeftConfig(hidden_size=12, num_heads=2))
    messages = [str(warning.message) for warning in seen if "only a part" in str(warning.message)]
    assert len(messages) == 1
    message = messages[0]
    assert "decoder.block (LongT5Block, blocks 0, 1)" in message.partition("The structure of")[0]
    assert "encoder.block (LongT5Block, blocks 0, 1)" in message.partition("The structure of")[2]
    assert "target_modules=[...]" in message


def test_a_choice_of_blocks_is_not_commented_on() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*only a part")
        get_peft_model(long_t5(), HoulsbyPeftConfig(target_modules=["decoder.block"]))


@pytest.mark.parametrize("host", [host for host in HOSTS if host.available], ids=str)
def test_models_of_known_structure_are_reached_as_a_whole(host: Any) -> None:
    model = host.build()
    table = describe_sites(model)
    found = {name for stack in table for name in stack.names}
    assert len(found) == sum(len(stack.names) for stack in table)
    assert all(stack.kind in ("pre-LN", "post-LN") for stack in table), str(table)
    assert {stack.path for stack in table} == {stack.path for stack in host.stacks}
    for stack in table:
        assert stack.methods["pal"] == "adapts"


def test_the_table_says_what_each_method_would_do_and_adds_nothing() -> None:
    model = long_t5()
    names = list(model.state_dict())
    table = describe_sites(model)
    known, unknown = sorted(table, key=lambda stack: stack.kind)
    assert (known.path, known.block, known.kind, known.width) == ("decoder.block", "LongT5Block", "pre-LN", 24)
    assert (unknown.path, unknown.kind, unknown.width) == ("encoder.block", "unknown", 0)
    assert known.methods["pal"] == known.methods["houlsby"] == "adapts"
    assert known.methods["ca_mtl"].startswith("rejected: its blocks pass the sum of mask and position biases")
    assert unknown.methods["pal"].startswith("not reached")
    assert "encoder.block  LongT5Block  2       unknown" in str(table)
    assert list(model.state_dict()) == names
    clip = describe_sites(BY_NAME["clip"].build())
    assert all("several stacks" in stack.methods["ca_mtl"] for stack in clip)
    assert describe_sites(BY_NAME["bert"].build()).stacks[0].methods["ca_mtl"] == "adapts"


def test_an_adapted_model_is_described_like_the_plain_one() -> None:
    plain = describe_sites(BY_NAME["llama"].build())
    adapted = get_peft_model(BY_NAME["llama"].build(), PALPeftConfig(hidden_size=12, num_heads=2))
    assert [stack.methods for stack in describe_sites(adapted)] == [stack.methods for stack in plain]
    assert len(describe_sites(torch.nn.Linear(2, 2))) == 0
