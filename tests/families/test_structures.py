"""The PAL term in models of different structure, in plain torch. `test_values.py` has hybrids and others."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import torch
from peft import get_peft_model
from torch import nn

from tests import zoo
from tests.methods import makers
from tests.zoo import HOST_WARNINGS

pytestmark = HOST_WARNINGS
STRUCTURES = {
    "post-LN": "bert",
    "pre-LN": "llama",
    "sandwich norms": "gemma2",
    "parallel residual": "gptj",
    "mixture of experts": "mixtral",
    "encoder and decoder": "t5",
    "images": "vit",
    "audio": "wav2vec2",
    "ALiBi": "bloom",
    "ALiBi, sequential": "falcon-sequential",
    "windows": "gemma3",
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_term(structure: str) -> None:
    host = zoo.BY_NAME[STRUCTURES[structure]]
    plain, inputs = host.build().requires_grad_(False), host.inputs()
    before = zoo.outputs_of(plain(**inputs))
    adapted = get_peft_model(host.build(), makers("peft", dropout=False)["pal"]()).eval()
    zoo.randomise(nn.ParameterList([p for p in adapted.parameters() if p.requires_grad]), seed=11)
    with torch.no_grad():
        actual = adapted(**inputs)
        with zoo.by_hand(host, plain, adapted.get_base_model(), "pal", inputs):
            expected = zoo.outputs_of(plain(**inputs))
    for name, value in expected.items():
        real = host.real(inputs, name)
        assert zoo.difference(value, before[name], real) > 1e-2
        assert zoo.difference(actual[name], value, real) < 2e-5
