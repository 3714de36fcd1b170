"""What a norm computes, found by running it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from pal_adapters.blocks.norms import NormForm, norm_form


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.LayerNorm(8, eps=1e-3), NormForm(centred=True, eps=1e-3, offset=0.0)),
        (nn.LayerNorm(8, eps=1e-3, elementwise_affine=False), NormForm(centred=True, eps=1e-3, offset=0.0)),
        (nn.RMSNorm(8, eps=1e-3), NormForm(centred=False, eps=1e-3, offset=0.0)),
        (LlamaRMSNorm(8, eps=1e-3), NormForm(centred=False, eps=1e-3, offset=0.0)),
        (GemmaRMSNorm(8, eps=1e-3), NormForm(centred=False, eps=1e-3, offset=1.0)),
        (NemotronLayerNorm1P(8, eps=1e-3), NormForm(centred=True, eps=1e-3, offset=1.0)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_forms(norm: nn.Module, expected: NormForm) -> None:
    before = {name: p.detach().clone() for name, p in norm.named_parameters()}
    form = norm_form(norm, 8)
    assert form == expected
    assert all(torch.equal(p, before[name]) for name, p in norm.named_parameters())
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 8)
    bias = getattr(norm, "bias", None)
    y = form.standardise(x) * form.scale(norm, x) + (0.0 if bias is None else bias)
    torch.testing.assert_close(y, norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [nn.BatchNorm1d(8), nn.Linear(8, 8), nn.GroupNorm(2, 8)])
def test_others_have_none(other: nn.Module) -> None:
    assert norm_form(other, 8) is None
