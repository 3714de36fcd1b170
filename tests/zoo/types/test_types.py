"""The sweep over model types: that it builds types, finds faults, and that the page is what it found."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import torch

from pal_adapters import LHUCPeftConfig
from tests.zoo import HOST_WARNINGS

from . import verdict as verdicts
from .build import NotBuilt, build, model_types
from .page import PAGE, render
from .plain import Plain
from .sizes import Size, small
from .sweep import read
from .verdict import METHODS, verdict

pytestmark = HOST_WARNINGS


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("roberta", {"PAL": "works", "LHUC": "works", "CA-MTL": "works"}),
        ("t5", {"PAL": "works", "LHUC": "works", "CA-MTL": "rejected"}),
        ("clip_text_model", {"PAL": "works", "LHUC": "works", "CA-MTL": "works"}),
    ],
)
def test_verdicts(kind: str, expected: dict[str, str]) -> None:
    plain = Plain(build(kind))
    assert {method: verdict(plain, method).kind for method in METHODS} == expected


def test_the_sweep_finds_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changing(LHUCPeftConfig):
        """Claims to start as the identity."""

        def __post_init__(self) -> None:
            self.init_weights = False
            super().__post_init__()

    def fail(**options: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(verdicts, "METHODS", {"changing": Changing, "failing": fail})
    plain = Plain(build("roberta"))
    found = verdict(plain, "changing")
    assert found.kind == "wrong"
    assert found.reason.startswith("a fresh adapter is off by")
    assert verdict(plain, "failing").kind == "crash"


def test_a_type_that_cannot_be_built_says_why() -> None:
    with pytest.raises(NotBuilt, match="no class"):
        build("no-such-type")


def test_small_configs() -> None:
    config = {
        "model_type": "x",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "layer_types": ["conv"] * 6 + ["full_attention"] * 6,
        "hidden_dropout_prob": 0.1,
        "vision_config": {"model_type": "y", "image_size": 224, "patch_size": 16, "num_key_value_heads": 12},
        "image_token_id": 50000,
        "rms_norm_eps": 1e-6,
    }
    result = small(config, Size())
    assert result["layer_types"] == ["conv", "full_attention"]
    assert (result["hidden_size"], result["num_hidden_layers"], result["hidden_dropout_prob"]) == (32, 2, 0.0)
    assert result["vision_config"] == {
        "model_type": "y", "image_size": 32, "patch_size": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    assert result["image_token_id"] < 128
    assert result["rms_norm_eps"] == 1e-6


def test_plain_promises() -> None:
    causal, encoder = Plain(build("gpt2")), Plain(build("roberta"))
    assert causal.sees_later == 0
    assert causal.generates is not None
    assert encoder.sees_later is None  # RoBERTa sees later tokens
    assert encoder.pads["right"] is not None
    assert torch.equal(causal.outputs["logits"], causal.model(**causal.inputs).logits)


def test_model_types() -> None:
    assert {"bert", "llama", "t5", "vit", "whisper"} <= set(model_types())


def test_the_page_is_what_the_sweep_found() -> None:
    assert PAGE.read_text() == render()
    assert not [
        (row["type"], name, found)
        for row in read().values()
        for name, found in row.get("verdicts", {}).items()
        if found["kind"] in ("wrong", "crash", "late")
    ]
