"""PALs in hybrids and packed images, recomputed in plain torch; `tests/hosts/test_models.py` has the other kinds."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from pal_adapters import PALPeftConfig
from tests import zoo
from tests.plain import pal
from tests.zoo import HOST_WARNINGS, V5

from .more import MORE

pytestmark = [*HOST_WARNINGS, pytest.mark.skipif(not V5, reason="the kinds and their names are of transformers 5")]
_HYBRIDS = {"qwen3-next": ("linear_attn", "self_attn"), "jamba": ("mamba", "self_attn"), "lfm2": ("conv", "self_attn")}


def _adapted(plain: nn.Module) -> Any:
    adapted = get_peft_model(copy.deepcopy(plain), PALPeftConfig(hidden_size=12, num_heads=2)).eval()
    zoo.randomise(nn.ParameterList([p for p in adapted.parameters() if p.requires_grad]), seed=11)
    return adapted


def _by_hand(plain: nn.Module, adapted: Any, path: str, mixers: tuple[str, ...], keep: Tensor) -> None:
    """Adds to each block of `plain` the PAL of that block: it reads what the block's mixer of tokens was given."""
    blocks, sources = (zoo.resolve(m, path) for m in (plain, adapted.get_base_model()))
    assert isinstance(blocks, nn.ModuleList)
    assert isinstance(sources, nn.ModuleList)
    for block, source in zip(blocks, sources, strict=True):
        caught: list[Tensor] = []
        mixer = next(getattr(block, name) for name in mixers if hasattr(block, name))
        mixer.register_forward_pre_hook(
            lambda m, args, kwargs, c=caught: c.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        weights = zoo.weights_of(source, "pal")

        def add(module: nn.Module, args: Any, out: Any, c: list[Tensor] = caught, w: Any = weights) -> Any:
            x = c[-1] if c[-1].dim() == 3 else c[-1][None]
            value = out[0] if isinstance(out, tuple) else out
            value = value + pal(x, w, keep).view(value.shape)
            return (value, *out[1:]) if isinstance(out, tuple) else value

        block.register_forward_hook(add)


@pytest.mark.parametrize("name", _HYBRIDS)
def test_hybrids(name: str) -> None:
    host = next(host for host in MORE if host.name == name)
    plain, inputs = host.build().requires_grad_(False), host.inputs()
    before = plain(**inputs).logits
    adapted, mask = _adapted(plain), inputs["attention_mask"].bool()
    length = mask.shape[1]
    keep = (torch.ones(length, length).tril().bool() & mask[:, None])[:, None]
    _by_hand(plain, adapted, "model.layers", _HYBRIDS[name], keep)
    with torch.no_grad():
        expected, actual = plain(**inputs).logits, adapted(**inputs).logits
    assert zoo.difference(expected, before, mask) > 1e-2
    assert zoo.difference(actual, expected, mask) < 2e-5


def test_packed_images() -> None:
    """The patches of two images behind each other, of which each sees those of its own image."""
    cls = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel
    torch.manual_seed(1)
    plain = cls(cls.config_class(depth=2, embed_dim=24, hidden_size=20, num_heads=2, mlp_ratio=2, patch_size=2)).eval()
    zoo.randomise(plain)
    inputs = {"hidden_states": torch.randn(24, 24), "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}
    before = plain(**inputs)[0]
    adapted = _adapted(plain)
    image = torch.tensor([0] * 16 + [1] * 8)
    _by_hand(plain, adapted, "blocks", ("attn",), (image[:, None] == image)[None, None])
    with torch.no_grad():
        expected, actual = plain(**inputs)[0], adapted(**inputs)[0]
    assert zoo.difference(expected, before) > 1e-2
    assert zoo.difference(actual, expected) < 2e-5


@pytest.mark.skipif(not zoo.V5, reason="transformers 5")
def test_packed_images_in_one_row() -> None:
    """The same for hidden states of `[1, n, d]`."""
    cls = transformers.HunYuanVLVisionTransformer
    config = cls.config_class(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, attention_heads=2, patch_size=2, out_hidden_size=20
    )
    torch.manual_seed(1)
    plain = cls(config).eval()
    zoo.randomise(plain)
    inputs = {"pixel_values": torch.randn(24, 12), "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}
    before = plain(**inputs).last_hidden_state
    adapted = _adapted(plain)
    image = torch.tensor([0] * 16 + [1] * 8)
    _by_hand(plain, adapted, "layers", ("self_attn",), (image[:, None] == image)[None, None])
    with torch.no_grad():
        expected, actual = plain(**inputs).last_hidden_state, adapted(**inputs).last_hidden_state
    assert zoo.difference(expected, before) > 1e-2
    assert zoo.difference(actual, expected) < 2e-5


def test_sparse_attention() -> None:
    """BigBird's blocks get no attention mask, but which tokens are padding; a PAL beside them sees all others."""
    cls = transformers.BigBirdModel
    config = cls.config_class(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36, block_size=2,
        num_random_blocks=1, max_position_embeddings=64, attention_type="block_sparse",
    )  # fmt: skip
    torch.manual_seed(1)
    plain = cls(config).eval()
    zoo.randomise(plain)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 11:] = 0
    inputs = {"input_ids": torch.randint(4, 40, (2, 16)), "attention_mask": mask}
    before = plain(**inputs).last_hidden_state
    adapted = _adapted(plain)
    for block, source in zip(plain.encoder.layer, adapted.get_base_model().encoder.layer, strict=True):
        caught: list[Tensor] = []
        weights = zoo.weights_of(source, "pal")
        block.register_forward_pre_hook(lambda m, args, c=caught: c.append(args[0]))
        block.output.LayerNorm.register_forward_pre_hook(
            lambda m, args, c=caught, w=weights: (args[0] + pal(c[-1], w, mask.bool()[:, None, None]),)
        )
    with torch.no_grad():
        expected, actual = plain(**inputs).last_hidden_state, adapted(**inputs).last_hidden_state
    assert plain.encoder.layer[0].attention.attention_type == "block_sparse"
    assert zoo.difference(expected, before, mask.bool()) > 1e-2
    assert zoo.difference(actual, expected, mask.bool()) < 2e-5
