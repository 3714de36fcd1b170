"""Blocks whose hidden states have their tokens or their channels first: the terms, recomputed in plain torch."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import get_peft_model

from pal_adapters import HoulsbyPeftConfig, LowRankPeftConfig, PALPeftConfig, ScaLearnPeftConfig, UnsupportedError
from tests import zoo
from tests.plain import low_rank, pal

pytestmark = [*zoo.HOST_WARNINGS, pytest.mark.filterwarnings("ignore:pal. only a part of FSMT")]
NAMES = ("one", "two")
_SEQ2SEQ = dict(src_vocab_size=40, tgt_vocab_size=40, langs=["en", "de"], d_model=24, encoder_layers=2,
                decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=36,
                decoder_ffn_dim=36, max_position_embeddings=40, dropout=0.0,
                use_cache=False)  # fmt: skip  # which fails in transformers 4.57
_SQUEEZE = dict(vocab_size=40, hidden_size=24, embedding_size=24, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=36, max_position_embeddings=40, q_groups=1, k_groups=1, v_groups=1,
                post_attention_groups=1, intermediate_groups=1, output_groups=1)  # fmt: skip
_CONVNEXT = dict(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, patch_size=2, image_size=8,
                 layer_scale_init_value=0.5)  # fmt: skip


def _model(name: str, **config: Any) -> Any:
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    zoo.randomise(model)
    return model


def _text(batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(4, 40, (batch, length), generator=generator), "attention_mask": mask}


def _adapted(model: Any, config: Any) -> Any:
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    zoo.randomise(nn.ParameterList([p for p in adapted.parameters() if p.requires_grad]), seed=11)
    return adapted


def _add(norm: nn.Module, term: Any) -> None:
    norm.register_forward_pre_hook(lambda m, args: (args[0] + term(), *args[1:]))


def _caught(module: nn.Module) -> list[Tensor]:
    """What a module is called with, the last call last."""
    values: list[Tensor] = []
    module.register_forward_pre_hook(
        lambda m, args, kwargs: values.append(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
    )
    return values


def test_channels_first_with_attention() -> None:
    plain, inputs = _model("SqueezeBertModel", **_SQUEEZE), _text()
    adapted = _adapted(plain, PALPeftConfig(hidden_size=12, num_heads=2))
    keep = inputs["attention_mask"].bool()[:, None, None].expand(-1, 1, 9, -1)
    for block, source in zip(plain.encoder.layers, adapted.get_base_model().encoder.layers, strict=True):
        caught, weights = _caught(block.attention), zoo.weights_of(source, "pal")
        # The norm of the feed-forward part gets the sum of its branch and the residual stream.
        _add(block.output.layernorm, lambda c=caught, w=weights: pal(c[-1].transpose(1, 2), w, keep).transpose(1, 2))
    with torch.no_grad():
        expected = plain(**inputs).last_hidden_state
        actual = adapted(**inputs).last_hidden_state
        with adapted.disable_adapter():
            assert (adapted(**inputs).last_hidden_state - expected).abs().max() > 1e-2
    assert zoo.difference(actual, expected, keep[:, 0, 0]) < 2e-5


def test_tokens_first_with_attention() -> None:
    plain, inputs = _model("FSMTModel", **_SEQ2SEQ), _text()
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    adapted = _adapted(plain, PALPeftConfig(hidden_size=12, num_heads=2))
    keep = inputs["attention_mask"].bool()[:, None, None].expand(-1, 1, 9, -1)
    for block, source in zip(plain.encoder.layers, adapted.get_base_model().encoder.layers, strict=True):
        caught, weights = _caught(block.self_attn), zoo.weights_of(source, "pal")
        _add(block.final_layer_norm, lambda c=caught, w=weights: pal(c[-1].transpose(0, 1), w, keep).transpose(0, 1))
    assert all(not hasattr(block, "pal") for block in adapted.get_base_model().decoder.layers)
    with torch.no_grad():
        expected, actual = plain(**inputs), adapted(**inputs)
    assert zoo.difference(actual.encoder_last_hidden_state, expected.encoder_last_hidden_state, keep[:, 0, 0]) < 2e-5
    assert zoo.difference(actual.last_hidden_state, expected.last_hidden_state) < 2e-5


def test_images_with_channels_first() -> None:
    plain = _model("ConvNextModel", **_CONVNEXT)
    adapted = _adapted(plain, LowRankPeftConfig(hidden_size=5))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    for stage, sources in zip(plain.encoder.stages, adapted.get_base_model().encoder.stages, strict=True):
        for block, source in zip(stage.layers, sources.layers, strict=True):
            caught, weights = _caught(block.dwconv), zoo.weights_of(source, "low_rank")
            block.register_forward_hook(
                lambda m, a, out, c=caught, w=weights: out + low_rank(c[-1].movedim(1, -1), w).movedim(-1, 1)
            )
    with torch.no_grad():
        expected, actual = plain(pixels).last_hidden_state, adapted(pixels).last_hidden_state
        with adapted.disable_adapter():
            assert (adapted(pixels).last_hidden_state - expected).abs().max() > 1e-2
    assert (actual - expected).abs().max() < 2e-5


def test_residual_blocks_with_an_activation_behind_the_sum() -> None:
    """The term is added in front of the activation, in blocks that keep the size of their input."""
    plain = _model("ResNetModel", embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic")
    adapted = _adapted(plain, LowRankPeftConfig(hidden_size=5))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    reached = 0
    for stage, sources in zip(plain.encoder.stages, adapted.get_base_model().encoder.stages, strict=True):
        for block, source in zip(stage.layers, sources.layers, strict=True):
            if not isinstance(block.shortcut, nn.Identity):
                continue
            caught, weights = _caught(block.layer), zoo.weights_of(source, "low_rank")
            block.layer.register_forward_hook(
                lambda m, a, out, c=caught, w=weights: out + low_rank(c[-1].movedim(1, -1), w).movedim(-1, 1)
            )
            reached += 1
    assert reached == 3
    with torch.no_grad():
        expected, actual = plain(pixels).last_hidden_state, adapted(pixels).last_hidden_state
        with adapted.disable_adapter():
            assert (adapted(pixels).last_hidden_state - expected).abs().max() > 1e-2
    assert (actual - expected).abs().max() < 2e-5


@pytest.mark.parametrize("config", [LowRankPeftConfig, HoulsbyPeftConfig])
@pytest.mark.parametrize("kind", ["tokens", "channels", "images"])
def test_a_mixed_batch_equals_one_call_per_adapter(config: Any, kind: str) -> None:
    if kind == "images":
        model = _model("ConvNextModel", **_CONVNEXT)
        inputs = {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))}
    else:
        model = _model("FSMTModel", **_SEQ2SEQ) if kind == "tokens" else _model("SqueezeBertModel", **_SQUEEZE)
        inputs = _text()
        if kind == "tokens":
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    adapted = get_peft_model(model, config(init_weights=False), adapter_name="one").eval()
    adapted.add_adapter("two", config(init_weights=False))
    for seed, name in enumerate(NAMES):
        own = [p for n, p in adapted.named_parameters() if f".{name}." in n]
        zoo.randomise(nn.ParameterList(own), seed=seed)
    names = ["one", "two", "one"]
    with torch.no_grad():
        mixed = adapted(**inputs, adapter_names=names).last_hidden_state
        for name in NAMES:
            adapted.set_adapter(name)
            alone = adapted(**inputs).last_hidden_state
            rows = [i for i, other in enumerate(names) if other == name]
            assert (mixed[rows] - alone[rows]).abs().max() < 2e-5


def test_a_mixed_batch_through_norms_of_another_form() -> None:
    """Nemotron's norm is a layer norm that adds one to its weight."""
    model = _model("NemotronForCausalLM", vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=2, intermediate_size=36, max_position_embeddings=40)  # fmt: skip
    adapted = get_peft_model(model, HoulsbyPeftConfig(init_weights=False), adapter_name="one").eval()
    adapted.add_adapter("two", HoulsbyPeftConfig(init_weights=False))
    for seed, name in enumerate(NAMES):
        own = [p for n, p in adapted.named_parameters() if f".{name}." in n]
        zoo.randomise(nn.ParameterList(own), seed=seed)
    inputs, names = _text(), ["one", "two", "one"]
    inputs["attention_mask"][:] = 1
    with torch.no_grad():
        mixed = adapted(**inputs, adapter_names=names).logits
        for name in NAMES:
            adapted.set_adapter(name)
            rows = [i for i, other in enumerate(names) if other == name]
            assert (mixed[rows] - adapted(**inputs).logits[rows]).abs().max() < 2e-5


def test_bottlenecks_are_not_combined_where_channels_come_first(tmp_path: pathlib.Path) -> None:
    model = _model("SqueezeBertModel", **_SQUEEZE)
    get_peft_model(copy.deepcopy(model), HoulsbyPeftConfig(init_weights=False)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="hidden states are not"):
        get_peft_model(model, ScaLearnPeftConfig(adapters={"one": str(tmp_path)}))
