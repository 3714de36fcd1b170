"""A method works on a family or rejects it, as the table of `docs/models.md` says."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import torch
import transformers
from peft import get_peft_model

from pal_adapters import CAMTLPeftConfig, SiteError
from tests.zoo import BY_NAME, HOST_WARNINGS, Host

from .checks import METHODS, verdict
from .table import ADAPTERS, PAGE, families, recorded

pytestmark = HOST_WARNINGS
# The others are checked by writing the table.
FAST = ("PAL", "top attention", "CA-MTL")
# The page holds for the minor version of transformers that it names.
RECORDED = f"transformers {transformers.__version__.rpartition('.')[0]}." in PAGE.read_text().partition(ADAPTERS)[0]


@pytest.mark.filterwarnings("ignore:pal. only a part of NemotronH")  # beside its feed-forward blocks nothing attends
@pytest.mark.filterwarnings("ignore:top_attention. only a part of NemotronH")
@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize("host", families()[::2], ids=str)
def test_a_method_works_or_is_rejected(host: Host, method: str) -> None:
    works = verdict(host, method) == "works"
    if RECORDED:
        assert works is recorded()[str(host), method]


@pytest.mark.skipif(not RECORDED, reason="the table was made with another version of transformers")
def test_the_table_is_whole() -> None:
    assert list(recorded()) == [(str(host), method) for host in families() for method in METHODS]


@pytest.mark.parametrize(
    ("name", "stack"), [("bart", "encoder.layers"), ("bart", "decoder.layers"), ("t5", "encoder.block")]
)
def test_a_network_steers_the_stack_that_is_chosen(name: str, stack: str) -> None:
    host, options = BY_NAME[name], {"target_modules": [stack], "bottleneck": "none", "init_weights": False}
    if name == "t5":  # whose blocks pass the sum of mask and position biases on
        with pytest.raises(SiteError, match=r"attention_layers=\[\]"):
            get_peft_model(host.build(), CAMTLPeftConfig(tasks=["a", "b"], **options))
        options["attention_layers"] = []
    inputs, plain = host.inputs(), host.build()
    model = get_peft_model(host.build(), CAMTLPeftConfig(tasks=["a", "b"], **options)).eval()
    assert all(name.startswith(f"base_model.model.{stack}") for name, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        first, second = (model(**inputs, task_ids=[task] * 3).last_hidden_state for task in "ab")
        before = plain(**inputs).last_hidden_state
        assert (first - before).abs().max() > 1e-4
        assert (first - second).abs().max() > 1e-5
        with model.disable_adapter():
            assert torch.equal(model(**inputs).last_hidden_state, before)
